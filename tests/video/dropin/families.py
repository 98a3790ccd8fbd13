"""Every model that a selector can be attached to, as the tests know it."""

import tiny_internvl
import tiny_internvl_chat
import tiny_llava
import tiny_qwen
import tiny_qwen3

FAMILIES = {
    family.name: family
    for family in (
        tiny_qwen.FAMILY,
        tiny_qwen3.FAMILY,
        tiny_internvl.FAMILY,
        *tiny_internvl_chat.FAMILIES,
        *tiny_llava.FAMILIES,
    )
}
