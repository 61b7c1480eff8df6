"""One peer library quantizes one model, in the peers' environment: `python peers_worker.py JOB.json`.

The job names a peer, a model folder, a file of calibration tokens, bits, group size, and the folder to write to. What
is written: `weights.safetensors`, the linear layers in float32, dequantized or with their zeros, and `report.json`:
seconds (of the technique alone, without importing, loading and writing), bits per weight as the peer itself stores
quantized layers, and the version of the peer; or the error. Nothing of edgelab is imported: the peers ask for other
versions of its dependencies.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Job:
    """What to do. bits: to round to, or 0. pattern: in which half of the weights go, or "".

    iterations: steps per block of a method that learns; other methods pass over it.
    """

    peer: str
    model: str
    tokens: str
    out: str
    bits: int
    pattern: str
    group_size: int
    iterations: int
    threads: int


class Clock:
    """Seconds spent inside `with clock:`."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the output head, by name."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def gptq_llm_compressor(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    grid = QuantizationArgs(
        num_bits=job.bits, type="int", symmetric=False, strategy="group", group_size=job.group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], actorder="static")
    layers = linear_layers(model)
    one_shot(recipe, model, tokens, job, clock)
    write(layers, job)
    model.save_pretrained(Path(job.out) / "packed", save_compressed=True)
    return stored_bytes(Path(job.out) / "packed", layers)


def wanda(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return removed(WandaPruningModifier, model, tokens, job, clock)


def sparsegpt(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return removed(SparseGPTModifier, model, tokens, job, clock)


def removed(modifier: type, model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    """Half of the weights of every linear layer but the head, by one of llm-compressor's methods."""
    structure = "0:0" if job.pattern == "unstructured" else job.pattern
    recipe = modifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["lm_head"])
    one_shot(recipe, model, tokens, job, clock)
    layers = linear_layers(model)
    write(layers, job)
    return sum(layer.weight.nbytes for layer in layers.values())


def one_shot(recipe: object, model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> None:
    """llm-compressor's way through a model, block after block."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    with clock:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.model),
            recipe=recipe,
            dataset=DataLoader(samples, batch_size=1),
            num_calibration_samples=len(samples),
            max_seq_length=tokens.shape[1],
            pipeline="sequential",
        )


def autoround(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from auto_round import AutoRound

    with clock:
        quantizer = AutoRound(
            model,
            AutoTokenizer.from_pretrained(job.model),
            bits=job.bits,
            group_size=job.group_size,
            sym=False,
            iters=job.iterations,
            nsamples=len(tokens),
            seqlen=tokens.shape[1],
            dataset=list(tokens.split(1)),
            device_map="cpu",
        )
        model, _ = quantizer.quantize()
    layers = linear_layers(model)
    for (
        layer
    ) in layers.values():  # its weights are rounded to bfloat16 once more, which its checkpoint is not
        scale, zero_point = layer.scale.half().float(), layer.zp.float()
        groups = layer.weight.detach().float().unflatten(1, (-1, job.group_size))
        scale, zero_point = (part.reshape(*groups.shape[:2], 1) for part in (scale, zero_point))
        integers = torch.round(groups / scale + zero_point).clamp(0, 2**job.bits - 1)
        layer.weight = nn.Parameter(((integers - zero_point) * scale).flatten(1), requires_grad=False)
    write(layers, job)
    # Its own format for asymmetric 4 bits is AWQ's, whose writer fails in 0.16; GPTQ's holds the same numbers.
    quantizer.save_quantized(str(Path(job.out) / "packed"), format="auto_round:auto_gptq", inplace=True)
    return stored_bytes(Path(job.out) / "packed", layers)


def hqq(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
    total = 0
    layers = linear_layers(model)
    for layer in layers.values():
        with clock:
            made = HQQLinear(layer, settings, compute_dtype=torch.float16, device="cpu", del_orig=False)
        layer.weight.data = made.dequantize().float()
        total += made.W_q.nbytes + made.meta["scale"].nbytes + made.meta["zero"].nbytes
    write(layers, job)
    return total


def torchao(model: PreTrainedModel, tokens: Tensor, job: Job, clock: Clock) -> int:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    settings = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )
    layers = linear_layers(model)
    with clock:
        quantize_(model, settings, filter_fn=lambda _, name: name in layers)
    total = 0
    for layer in layers.values():
        packed = layer.weight
        total += packed.qdata.nbytes + packed.scale.nbytes + packed.zero_point.nbytes
        layer.weight = nn.Parameter(packed.dequantize().float(), requires_grad=False)
    write(layers, job)
    return total


# Name on the distribution index, and a method where it has several -> what runs it: changes the model, times itself,
# writes it, returns stored bytes.
PEERS: dict[str, Callable[[PreTrainedModel, Tensor, Job, Clock], int]] = {
    "llmcompressor": gptq_llm_compressor,
    "llmcompressor/wanda": wanda,
    "llmcompressor/sparsegpt": sparsegpt,
    "auto-round": autoround,
    "hqq": hqq,
    "torchao": torchao,
}


def write(layers: dict[str, nn.Linear], job: Job) -> None:
    """The weights of the linear layers, in float32. None of these methods changes anything else of a model."""
    weights = {f"{name}.weight": layer.weight.detach().float().clone() for name, layer in layers.items()}
    save_file(weights, Path(job.out) / "weights.safetensors")


def stored_bytes(folder: Path, names: Iterable[str]) -> int:
    """Bytes of the tensors that a checkpoint holds for the named layers, biases left out."""
    total = 0
    for file in folder.glob("**/*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                layer, _, part = name.rpartition(".")
                if layer in names and part != "bias":
                    total += opened.get_tensor(name).nbytes
    return total


def run(job: Job) -> dict[str, object]:
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, use_safetensors=True).eval()
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    clock = Clock()
    stored = PEERS[job.peer](model, load_file(job.tokens)["tokens"], job, clock)
    return {
        "seconds": clock.seconds,
        "bits_per_weight": 8 * stored / weights,
        "version": importlib.metadata.version(job.peer.partition("/")[0]),
    }


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{field.name: values[field.name] for field in fields(Job)})
    try:
        report = run(job)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        report = {"error": f"{type(error).__name__}: {first}"}
    (Path(job.out) / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
