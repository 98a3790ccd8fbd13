"""The questions of a prompt: what is asked about each video, and where that stands."""

from typing import Any

import torch
from torch import nn

from qts_video.adapters.base import Adapter
from qts_video.dropin.layout import Layout
from qts_video.dropin.question import find_question, occurrences
from qts_video.dropin.time_list import find_time_sentence


class Questions:
    """Of the prompts of a model: the text of the last user turn, or what was given."""

    def __init__(self, model: nn.Module, adapter: Adapter, tokenizer: Any | None, name: str) -> None:
        self.model, self.adapter, self.tokenizer, self.name = model, adapter, tokenizer, name
        self.markers = adapter.chat_markers(model, tokenizer)
        self.given: list[torch.Tensor] | None = None
        """Token ids [L] on the CPU: one question for all samples, or one a sample; None: the prompt says it."""

    def of_videos(self, layout: Layout) -> list[torch.Tensor]:
        """The question of each video: token ids [L] on the CPU."""
        if self.given is not None:
            return [self._given(layout, sample) for sample in layout.sample]
        of_sample = {sample: layout.input_ids[sample][self._find(layout, sample)] for sample in set(layout.sample)}
        return [of_sample[sample] for sample in layout.sample]

    def locate(self, layout: Layout, sample: int) -> torch.Tensor:
        """Where the question of a sample is in its prompt, found or given: columns [Lq] int64 on the CPU."""
        if self.given is None:
            return self._find(layout, sample)
        question, columns = self._given(layout, sample), layout.valid[sample].nonzero().squeeze(1)
        found = occurrences(layout.input_ids[sample][columns], question.tolist())
        if len(found) == 0:
            raise ValueError(
                f"the question given with handle.question(...) is not in the prompt of sample {sample}, token for "
                "token, so nothing can be read of its attention: leave it out, and the last user turn's text is taken"
            )
        return columns[int(found[-1]) :][: len(question)]

    def _given(self, layout: Layout, sample: int) -> torch.Tensor:
        if len(self.given) not in (1, layout.batch):
            raise ValueError(f"{len(self.given)} questions were given for a batch of {layout.batch}")
        return self.given[sample if len(self.given) > 1 else 0]

    def _find(self, layout: Layout, sample: int) -> torch.Tensor:
        """Where the last user turn's text is in the prompt of a sample: columns [Lq] int64 on the CPU."""
        if self.markers is None:
            raise ValueError(
                f"{self.name} needs the question, and the model's vocabulary is not the official one: give "
                "attach(..., tokenizer=...), or the question with handle.question(...)"
            )
        columns = layout.valid[sample].nonzero().squeeze(1)
        vision = self.adapter.vision_token_ids(self.model, self.tokenizer)
        # Times of steps are text in the user's turn, but not of the question: labels, and the sentence with a list.
        ids = layout.input_ids[sample].masked_fill(layout.in_steps(sample), vision[0])[columns]
        if self.tokenizer is not None:
            ids[find_time_sentence(ids, torch.isin(ids, torch.tensor(vision)), self.tokenizer)] = vision[0]
        return columns[find_question(ids, self.markers, vision)]
