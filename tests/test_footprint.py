"""Training memory from shapes: counts by hand, published counts, and the same step with values."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgelab.devices.catalogue import Device, with_room
from edgelab.devices.shapes import models
from edgelab.errors import EdgeLabError
from edgelab.lab.training_memory import training_memory
from edgelab.model.losses import cross_entropy
from edgelab.recipes import Context
from edgelab.techniques.footprint import Living, footprint
from edgelab.techniques.lora import LoRA, QLoRA

CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    tie_word_embeddings=True,
)
LINEAR = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128)
TRAINED = 2 * 8 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))  # rank 8
PARAMETERS = LINEAR + 300 * 64 + 5 * 64
SHAPE = {"batch": 2, "length": 32}


def test_parts_by_hand():
    full, lora = footprint(CONFIG, **SHAPE), footprint(CONFIG, LoRA(rank=8), **SHAPE)
    assert (full.parameters, full.trained) == (PARAMETERS, PARAMETERS)
    assert (lora.parameters, lora.trained) == (PARAMETERS + TRAINED, TRAINED)
    assert lora.share == TRAINED / (PARAMETERS + TRAINED)
    for found, trained in ((full, PARAMETERS), (lora, TRAINED)):
        assert found.need.gradients_gb * 1e9 == pytest.approx(4 * trained)
        assert found.need.optimizer_gb * 1e9 == pytest.approx(8 * trained)
    buffers = (lora.need.weights_gb - full.need.weights_gb) * 1e9 - 4 * TRAINED
    assert buffers == pytest.approx(0, abs=1)
    assert full.need.weights_gb * 1e9 == pytest.approx(4 * PARAMETERS, rel=0.01)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (3, 0)])
def test_packed_weights_by_hand(bits, group_size):
    held = footprint(CONFIG, QLoRA(), bits=bits, group_size=group_size, packed=False, **SHAPE)
    packed = footprint(CONFIG, QLoRA(), bits=bits, group_size=group_size, **SHAPE)
    float_ = footprint(CONFIG, LoRA(), **SHAPE)
    groups = 2 * (64 + 32 + 32 + 64 + 128 + 128) * (64 // (group_size or 64)) + 2 * 64 * (
        128 // (group_size or 128)
    )
    assert (float_.need.weights_gb - held.need.weights_gb) * 1e9 == pytest.approx(3 * LINEAR - 3 * groups)
    assert (held.need.weights_gb - packed.need.weights_gb) * 1e9 == pytest.approx(
        (LINEAR + groups) * (1 - bits / 8)
    )


@pytest.mark.parametrize("technique", [None, LoRA(rank=4)], ids=["all", "lora"])
def test_the_same_step_with_values_lives_as_much(technique):
    """Real tensors, counted by the same counter, come to the same bytes."""
    with Living() as living:
        model = LlamaForCausalLM(CONFIG).requires_grad_(technique is None)
    if technique is not None:
        model = technique.started(model, Context())
    trained = [one for one in model.parameters() if one.requires_grad]
    ids = torch.zeros(2, 32, dtype=torch.long)
    optimizer = torch.optim.AdamW(trained, fused=True)
    with Living() as living:
        for _ in range(2):
            before = living.peak = living.bytes
            loss = cross_entropy(model, ids)
            kept = living.bytes - before
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss
    counted = footprint(CONFIG, technique, **SHAPE)
    # The counter meets the real weights first where the step reads them, the fake ones where they are made.
    assert counted.need.activations_gb * 1e9 == pytest.approx(kept, rel=0.02)


def test_what_recomputing_saves():
    again = footprint(CONFIG, activation_checkpointing=True, **SHAPE)
    assert again.need.activations_gb < 0.5 * footprint(CONFIG, **SHAPE).need.activations_gb


def test_published_models():
    """FACTS: LoRA of rank 8 on all linear layers, and on queries and values, of Llama-2-7B."""
    shape = models()["Llama-2-7B"]
    sizes = {"dtype": torch.bfloat16, "batch": 1, "length": 8}
    assert footprint(shape, LoRA(rank=8), **sizes).trained == 19_988_480
    found = footprint(shape, LoRA(rank=8, targets="q_proj/v_proj"), **sizes)
    assert found.trained == 4_194_304 and found.parameters == shape.parameters + 4_194_304
    assert found.need.weights_gb == pytest.approx((2 * shape.parameters + 4 * found.trained) / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "targets", "trained"),
    [
        ("SmolLM2-135M", "all", 2_442_240),
        ("SmolLM2-135M", "attention", 921_600),
        ("SmolLM2-135M", "q_proj/v_proj", 460_800),
        ("Llama-2-70B", "all", 103_546_880),
        ("Llama-2-70B", "q_proj/v_proj", 16_384_000),
    ],
)
def test_published_counts_of_an_adapter(model, targets, trained):
    """FACTS: of rank 8."""
    sizes = {"dtype": torch.bfloat16, "batch": 1, "length": 4}
    found = footprint(models()[model], LoRA(rank=8, targets=targets), **sizes)
    assert found.trained == trained and found.need.optimizer_gb == pytest.approx(8 * trained / 1e9)


def test_devices_with_room():
    small, large = Device("small", "phone", 4), Device("large", "server", 64)
    assert with_room(5, [small, large]) == [large] and with_room(1, [small, large]) == [small, large]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("quantize.rtn", "does not end in training"),
        ("recover", "such as a teacher"),
        ("distill", "such as a teacher"),
        ("qat:bits=4,group_size=32", "such as a teacher"),
        ("lora:dora=true", "without dropout and dora"),
        ("quantize.rtn:bits=4,group_size=32 + quantize.embedding + qlora", "all on one grid"),
        ("prune.channels:by_layer=global,by=magnitude + recover:loss=ce", "even shapes"),
    ],
)
def test_what_is_not_counted_is_refused(recipe, sentence, tiny):
    with pytest.raises(EdgeLabError, match=sentence):
        training_memory(recipe, str(tiny))
