"""Where the videos of a prompt are: found once on the host, before the model runs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The videos of one prefill of B samples and L columns. Host data only: reading it never synchronises."""

    input_ids: torch.Tensor
    """[B, L] int64, on the CPU."""
    valid: torch.Tensor
    """[B, L] bool: the columns that are not padding."""
    rows: torch.Tensor
    """[sum M] int64: of every video token, its row of the flattened B*L axis, in the order of the
    placeholders."""
    grids: list[tuple[int, int, int]]
    """(time steps, rows, columns) of each video."""
    lengths: list[int]
    """Tokens of each video: the product of its grid."""
    sample: list[int]
    """The batch row of each video."""

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    @property
    def columns(self) -> int:
        return self.valid.shape[1]


def locate_videos(
    input_ids: torch.Tensor, valid: torch.Tensor, video_token_id: int, grids: list[tuple[int, int, int]]
) -> Layout:
    """Match the placeholders of ``input_ids`` [B, L] with the videos' grids, in order.

    Args:
        input_ids: [B, L] int64 on the CPU.
        valid: [B, L] bool on the CPU, false where the prompt is padded.
        video_token_id: the placeholder.
        grids: (time steps, rows, columns) of each video after the merger, sample after sample.

    Raises:
        ValueError: a placeholder is masked, or a sample's placeholders are not those of a whole number of its
            videos.
    """
    placeholder = input_ids == video_token_id
    if bool((placeholder & ~valid).any()):
        raise ValueError("attention_mask is 0 on video placeholders; mask only padding, selection drops the rest")
    lengths = [t * h * w for t, h, w in grids]
    sample, video = [], 0
    for row, count in enumerate(placeholder.sum(1).tolist()):
        first, left = video, count
        while left > 0 and video < len(grids):
            left -= lengths[video]
            sample.append(row)
            video += 1
        if left != 0:
            raise ValueError(
                f"sample {row} has {count} video placeholders, but its videos' grids {grids[first:video]} "
                f"(time, rows, columns after the merger) make {count - left} tokens"
            )
    if video != len(grids):
        raise ValueError(f"{len(grids)} video grids were given, but input_ids hold placeholders for {video}")
    rows = placeholder.flatten().nonzero().squeeze(1)
    return Layout(input_ids=input_ids, valid=valid, rows=rows, grids=grids, lengths=lengths, sample=sample)


def to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integer tensors on the CPU as int64, in one transfer for all that share a device."""
    host = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        flat = torch.cat([tensor.reshape(-1).long() for tensor in here.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in here.values()])
        host |= {name: part.view(tensor.shape) for (name, tensor), part in zip(here.items(), parts, strict=True)}
    return host
