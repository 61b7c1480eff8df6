"""Exercises of notebook 00: what a model needs to run."""

from edgelab.devices import catalogue, inference_memory, models
from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


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
    device = next(device for device in catalogue() if device.name == "Jetson Orin Nano")
    needs = {bits: inference_memory(shape, bits, context=4096) for bits in (16, 8, 4, 3, 2)}
    return Exercise(
        answer=max(bits for bits, need in needs.items() if device.holds(need)),
        why=f"The weights alone would fit at 4 bits, but the cache adds {needs[4].kv_cache_gb:.2f} GB.",
        hint=f"inference_memory(shape, bits, context=4096).total_gb has to stay under {device.room_gb:g} GB.",
        mistakes=[
            (
                bits,
                f"the weights take {need.weights_gb:.2f} GB, but everything {need.total_gb:.2f} GB.",
            )
            for bits, need in needs.items()
            if need.weights_gb <= device.room_gb < need.total_gb
        ],
    )


@exercise
def tokens_that_fit() -> CodeExercise:
    """How many tokens of context fit next to the weights: room_gb, weights_gb, layers, kv_heads, head_dim -> tokens."""

    def fit(
        room_gb: float, weights_gb: float, layers: int, kv_heads: int, head_dim: int, stored: int = 4
    ) -> int:  # stored: bytes for each number of a head, 2 for the key and 2 for the value
        return int((room_gb - weights_gb) * 1e9 // (layers * kv_heads * head_dim * stored))

    return CodeExercise(
        inputs=(3.8103, 3.8, 32, 8, 128),
        solution=fit,
        why="One token takes 131,072 bytes, and 10.3 MB are left for them.",
        hint="Bytes that are left, divided by the bytes of one token, and rounded down.",
        mistakes=[
            (
                lambda *sizes: fit(*sizes, stored=2),
                "a token keeps keys and values, and each number takes 2 bytes.",
            ),
            (lambda *sizes: fit(*sizes, stored=32), "memory is counted in bytes: 16 bits are 2 of them."),
            (lambda room_gb, _, *sizes: fit(room_gb, 0, *sizes), "the weights are in the memory too."),
            (lambda *sizes: fit(*sizes) + 1, "a part of a token does not fit: round down."),
            (
                lambda room_gb, weights_gb, *sizes: fit(
                    room_gb * 2**30 / 1e9, weights_gb * 2**30 / 1e9, *sizes
                ),
                "a GB here is 10⁹ bytes, not 2³⁰.",
            ),
        ],
    )
