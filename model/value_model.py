"""A Transformer that answers with one number per token: the critic of PPO.

Shape suffixes: B batch, T tokens, D model dim. The number after token t is the value of the state in which the tokens
up to and including t have been read and the next one has not been chosen.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Transformer


class ValueModel(nn.Module):
    """Backbone and a linear head of one output with bias, zero at the start: an untrained critic says 0 everywhere.

    The backbone has no output head of its own, tied or not: gradients would never reach it, so under FSDP2 it would be
    sharded, kept by the optimizer and saved for nothing. Sharded from outside like a Transformer (`layers`, then the
    root, which holds embeddings, final norm and value head).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = Transformer(config)
        self.backbone.output = None
        self.value_head = nn.Linear(config.dim, 1, bias=True)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def config(self) -> ModelConfig:
        """The backbone's; tie_embeddings is that of the model it came from and means nothing here."""
        return self.backbone.config

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's blocks."""
        return self.backbone.layers

    @property
    def activation_checkpointing(self) -> bool:
        """True: blocks are recomputed in backward, as in Transformer."""
        return self.backbone.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, active: bool) -> None:
        self.backbone.activation_checkpointing = active

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        position_ids_BT: Tensor | None = None,
        segment_lengths: list[int] | None = None,
        segment_masks: list[Tensor | None] | None = None,
    ) -> Tensor:
        """values_BT, fp32 (fp64 for an fp64 model), in the unit of the rewards: [b, t] after reading token t.

        The optional arguments and ValueError: as in Transformer.forward. The value of the state before response token t
        is therefore the one at token t - 1, the prompt's last token for the first.
        """
        hidden_BTD = self.backbone(
            input_ids_BT,
            position_ids_BT=position_ids_BT,
            segment_lengths=segment_lengths,
            segment_masks=segment_masks,
            return_hidden=True,
        )
        # bf16 has a step of 0.004 at 1: advantages are differences of values, so the head's product is taken in fp32
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        weight_D = self.value_head.weight[0].to(dtype)
        # the sum is a tensor of its own: FSDP2 hooks its backward to the output and warns of views
        return hidden_BTD.to(dtype) @ weight_D + self.value_head.bias.to(dtype)
