"""The command line of ``qts split``. Needs nothing but the standard library."""

import argparse


def add_split(commands: argparse._SubParsersAction) -> None:
    split = commands.add_parser(
        "split",
        help="take a checkpoint apart into its language model and its vision tower",
        description="Writes DIR/language_model, which transformers loads as a language model, and DIR/vision, the "
        "weights of the vision tower and the projector with their config, of a Qwen2.5-VL, an InternVL "
        "(InternVLChatModel or transformers' own), a LLaVA-OneVision or a converted LLaVA-Video. The checkpoint is "
        "read shard by shard and left as it is.",
    )
    split.add_argument("checkpoint", metavar="PATH_OR_HUB_ID", help="a folder with config.json and safetensors")
    split.add_argument("--output", required=True, metavar="DIR", help="folder for the two parts")
    split.add_argument("--force", action="store_true", help="write although the folders are not empty")
