"""A variant of the model: a bias that grows with distance, as in ALiBi, is added to the attention scores.

    python examples/attention_bias.py --data my.txt --output_dir out

It takes all flags of main.py. Only the bias is new: masks, both streams, memory and relative positions stay.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from xlnet import Keys, Queries, QueryBlock, XLNet


class Alibi(XLNet):
    """XLNet whose scores fall by `slope` for each token of distance; each head has its own slope.

    Source: arXiv:2108.12409, section 3, with the distance to either side.
    """

    def queries_and_keys(
        self,
        inp_k: Tensor,
        seg_id: Tensor | None,
        mlen: int,
        slots: Tensor | None,
        blocks: list[QueryBlock],
        dtype: torch.dtype,
    ) -> tuple[Queries, Keys]:
        queries, keys = super().queries_and_keys(inp_k, seg_id, mlen, slots, blocks, dtype)
        n_head, device = self.config["n_head"], inp_k.device
        slope = 2 ** (-8 / n_head * torch.arange(1, n_head + 1, device=device))
        positions = queries.position.split([block.attn_mask.size(2) for block in blocks], dim=1)
        biased = []
        for block, position in zip(blocks, positions, strict=True):
            key_position = torch.arange(block.attn_mask.size(3), device=device)
            distance = (position[:, None, :, None] - key_position).abs()  # [bsz, 1, n_query, n_key]
            bias = -slope[:, None, None] * distance  # [bsz, n_head, n_query, n_key]
            biased.append(block._replace(attn_mask=block.attn_mask + bias.to(dtype)))
        return queries._replace(blocks=biased), keys


if __name__ == "__main__":
    main.main(model_class=Alibi)
