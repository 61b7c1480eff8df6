"""Sessions over some of a model's layers, in PyTorch: what a device holds that runs a part of a model.

The first part takes token ids, or what its embedding makes of them; the last gives logits; all others take and give
hidden states. Each has keys and values of its own, and can take its last tokens back.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgelab.model.blocks import block_list
from edgelab.model.logits import check_frequencies, head_logits
from edgelab.runtimes.eager import TorchCache, use_kernels
from edgelab.runtimes.session import SessionError
from edgelab.storage import variants
from edgelab.storage.layers import packed_layers


class LayerSession:
    """Layers `first` to `last` of a variant or of a model, `last` not included, on the packed kernels of eager.

    A model given as such is not changed, and shares the weights of those layers with the session.
    """

    def __init__(self, source: Path | PreTrainedModel, first: int, last: int) -> None:
        whole = variants.load(source) if isinstance(source, Path) else source
        depth = len(block_list(whole)[1])
        if not 0 <= first < last <= depth:
            raise SessionError(f"Layers {first} to {last} are no part of a model of {depth} layers.")
        self.first, self.last = first, last
        self.takes_ids, self.gives_logits = first == 0, last == depth
        self.model = part(whole, first, last)
        self.kernel, _ = use_kernels(self.model)
        self._cache = TorchCache(self.model)
        self._read: list[Tensor] = []  # all of the sequence, for a cache that cannot take tokens back
        self.length = 0

    def extend(self, inputs: list[int] | Tensor) -> Tensor:
        """Go on by some tokens, ids (time,) or hidden states (time, hidden).

        Returns their hidden states after the last layer held, or float32 logits where that is the model's last.
        """
        given = torch.as_tensor(inputs)
        with torch.inference_mode():
            if given.dim() == 1:
                if not self.takes_ids:
                    raise SessionError(f"Layers {self.first} to {self.last} take hidden states, not tokens.")
                given = self.model.get_input_embeddings()(given)
            found = self._step(given)
            self._read.append(given)
            self.length += len(given)
            return head_logits(self.model, found) if self.gives_logits else found

    def rewind(self, count: int) -> None:
        """Take the last tokens back. Raises SessionError where there are fewer."""
        if not 0 <= count <= self.length:
            raise SessionError(f"{count} tokens cannot be taken back from a sequence of {self.length}.")
        if count == 0:
            return
        self.length -= count
        kept = torch.cat(self._read)[: self.length]
        self._read = [kept]
        if self.length == 0 or not self._cache.cut(self.length):
            self._cache.reset()
            if self.length:
                with torch.inference_mode():
                    self._step(kept)

    def _step(self, given: Tensor) -> Tensor:
        check_frequencies(self.model.config, self._cache.length, len(given))
        answer = self.model.base_model(
            inputs_embeds=given[None], past_key_values=self._cache.values, use_cache=True
        )
        return answer.last_hidden_state[0]


def part(whole: PreTrainedModel, first: int, last: int) -> PreTrainedModel:
    """A model of the layers `first` to `last` of another, with its weights; embedding and head at its ends only."""
    shared = [*whole.parameters(), *whole.buffers(), *(one.tensor for one in packed_layers(whole).values())]
    model = copy.deepcopy(whole, {id(one): one for one in shared})
    name, layers = block_list(model)
    depth = len(layers)
    model.set_submodule(name, layers[first:last])
    for module in model.get_submodule(name).modules():
        if hasattr(module, "layer_idx"):  # the place of its keys and values in the cache
            module.layer_idx -= first
    model.config.num_hidden_layers = last - first
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[first:last]
    unused = []
    if first > 0:
        unused.append(model.get_input_embeddings())
    if last < depth:
        final_norm = next(child for name, child in model.base_model.named_children() if "norm" in name)
        unused += [final_norm, model.get_output_embeddings()]
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if any(module is one for one in unused):
            model.set_submodule(place, nn.Identity())
    return model
