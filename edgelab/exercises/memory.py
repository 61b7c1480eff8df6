"""Exercises of notebook 00: what a model needs to run."""

from edgelab.devices import catalogue, inference_memory, models
from edgelab.exercises.checking import Exercise, exercise


@exercise
def cache_of_70b() -> Exercise:
    """KV cache in GB of Llama-2-70B for 8 sequences of 4,096 tokens in 16 bits."""
    shape = models()["Llama-2-70B"]
    right = inference_memory(shape, context=4096, batch=8, kv_bits=16).kv_cache_gb
    return Exercise(
        answer=right,
        why="Grouped-query attention made it 8 times smaller: 64 query heads share 8 key-value heads.",
        hint="2 (keys and values) × layers × kv_heads × head_dim × tokens × sequences × bytes per value.",
        mistakes=[
            (right * 1e9 / 2**30, "you divided by 2³⁰; a GB here is 10⁹ bytes."),
            (
                right * 8,
                "eight times too much: only the 8 key-value heads are cached, and 16 bits are 2 bytes.",
            ),
            (right * 64, "count the 8 key-value heads, not the 64 query heads, and bytes, not bits."),
            (right / 2, "keys and values are both cached."),
            (right / 8, "that is one sequence; there are 8."),
        ],
    )


@exercise
def bits_for_13b() -> Exercise:
    """The most bits, of 16, 8, 4, 3 and 2, at which Llama-2-13B with 4,096 tokens fits a Jetson Orin Nano."""
    shape = models()["Llama-2-13B"]
    memory_gb = next(device.memory_gb for device in catalogue() if device.name == "Jetson Orin Nano")
    needs = {bits: inference_memory(shape, bits, context=4096) for bits in (16, 8, 4, 3, 2)}
    return Exercise(
        answer=max(bits for bits, need in needs.items() if need.total_gb <= memory_gb),
        why=f"The weights alone would fit at 4 bits, but the cache adds {needs[4].kv_cache_gb:.2f} GB.",
        hint=f"inference_memory(shape, bits, context=4096).total_gb has to stay under {memory_gb:g} GB.",
        mistakes=[
            (
                bits,
                f"the weights take {need.weights_gb:.2f} GB, but everything {need.total_gb:.2f} GB.",
            )
            for bits, need in needs.items()
            if need.weights_gb <= memory_gb < need.total_gb
        ],
    )
