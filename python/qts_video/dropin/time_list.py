"""Times of frames in the text of a prompt, as LLaVA-Video was trained with: "The video lasts for 12.00 seconds, and 4
frames are uniformly sampled from it. These frames are located at 0.00s,4.00s,8.00s,12.00s.Please answer ..."."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

_TIME = r"\d+(?:\.\d+)?s"
_LIST = re.compile(rf"(?<![\w.]){_TIME}(?:\s*,\s*{_TIME})+(?!\w)")
_SENTENCE = re.compile(
    rf"The video lasts for [\d.]+ seconds?, and \d+ frames are uniformly sampled from it. These frames are located at "
    rf"{_TIME}(?:,{_TIME})*.Please answer the following questions related to this video. ".replace(" ", r"\s*")
)


def write_time_sentence(duration: float, seconds: Sequence[float]) -> str:
    """What LLaVA-Video was told of a video of ``duration`` seconds whose frames are at ``seconds``."""
    times = ",".join(f"{time:.2f}s" for time in seconds)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(seconds)} frames are uniformly sampled from it. These "
        f"frames are located at {times}.Please answer the following questions related to this video."
    )


def find_time_sentence(ids: torch.Tensor, vision: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Which tokens are such a sentence, and the white space behind it.

    Args:
        ids: [L] int64 on the CPU, one sample's prompt.
        vision: [L] bool, the tokens that are no text.
        tokenizer: of the model.

    Returns:
        [L] bool.
    """
    inside = torch.zeros(len(ids), dtype=torch.bool)
    if _SENTENCE.search(tokenizer.decode(ids[~vision].tolist())) is None:
        return inside
    text, starts = _spell(ids, vision, tokenizer)
    for match in _SENTENCE.finditer(text):
        # A token that reaches beyond the sentence is not of it.
        stop = bisect_left(starts, match.end() + 1) - 1
        inside[bisect_left(starts, match.start()) : stop] = True
    return inside


def find_lost_times(
    ids: torch.Tensor, vision: torch.Tensor, tokenizer: Any, stays: Sequence[Sequence[bool]]
) -> tuple[torch.Tensor, list[str]]:
    """Which tokens go where lists of times lose those of steps that go. Of what is left of a list, the last time ends
    as the whole list did: "0s,4s,8s." without its last two becomes "0s.".

    A list is at least two times with commas between them: "4s, 8.25s". The first that has as many as a video has steps
    is that video's, the first behind it of the next one's; a video may have none.

    Args:
        ids, vision, tokenizer: see ``find_time_sentence``.
        stays: of each video of the sample, in order, of each of its steps.

    Returns:
        [L] bool, and a sentence for each list that had to be left as it is, as its tokens don't end where its times do.
    """
    lost, notes = torch.zeros(len(ids), dtype=torch.bool), []
    if all(map(all, stays)) or _LIST.search(tokenizer.decode(ids[~vision].tolist())) is None:
        return lost, notes
    text, starts = _spell(ids, vision, tokenizer)
    lists = [list(re.finditer(_TIME, match[0])) for match in _LIST.finditer(text)]
    offsets = [match.start() for match in _LIST.finditer(text)]
    first = 0
    for number, steps in enumerate(stays):
        found = next((i for i in range(first, len(lists)) if len(lists[i]) == len(steps)), None)
        if found is None:
            continue
        first = found + 1
        ranges = [(offsets[found] + a, offsets[found] + b) for a, b in _lost_ranges(lists[found], steps)]
        places = [[bisect_left(starts, end) for end in ends] for ends in ranges]
        if [[starts[place] for place in ends] for ends in places] != [list(ends) for ends in ranges]:
            notes.append(
                f"the list of times of video {number} in the prompt is left whole: its tokens don't end where its "
                "times do"
            )
            continue
        for start, stop in places:
            lost[start:stop] = True
    return lost, notes


def _lost_ranges(times: list[re.Match], stays: Sequence[bool]) -> list[tuple[int, int]]:
    """Which characters go. Behind the number of the last time that stays comes what is behind the last one's."""
    kept = [i for i, stay in enumerate(stays) if stay]
    if not kept:
        return [(times[0].start(), times[-1].end())]
    ranges = [(times[i].start(), times[i + 1].start()) for i in range(kept[-1]) if not stays[i]]
    if kept[-1] < len(times) - 1:
        ranges.append((times[kept[-1]].end() - 1, times[-1].end() - 1))
    return ranges


def _spell(ids: torch.Tensor, vision: torch.Tensor, tokenizer: Any) -> tuple[str, list[int]]:
    """The tokens' texts one behind another, NUL for vision, and where each starts, the end last."""
    # Behind itself, as some tokenizers leave out the space before the first token.
    pieces = {
        token: tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
        for token in ids[~vision].unique().tolist()
    }
    text = zip(ids.tolist(), (~vision).tolist(), strict=True)
    texts = [pieces[token] if is_text else "\0" for token, is_text in text]
    return "".join(texts), [0, *accumulate(map(len, texts))]
