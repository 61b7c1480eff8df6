"""Peak memory of a process and the size of a key-value cache, against blocks and caches that exist."""

import resource
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from edgelab import reference
from edgelab.measure import memory
from edgelab.measure.isolation import Isolated
from edgelab.measure.memory import peak_rss_mb
from edgelab.measure.size import kv_cache_mb_per_1k
from edgelab.storage.description import Description

SUBJECT = """
from edgelab.measure.memory import peak_rss_mb

class Subject:
    def peak(self):
        return peak_rss_mb()

    def fill_and_free(self, megabytes):
        block = bytearray(megabytes * 10**6)
        block[::4096] = b"x" * len(block[::4096])
        del block
        return peak_rss_mb()
"""


def test_peak_of_a_fresh_process_starts_anew_and_stays_after_freeing(tmp_path, monkeypatch):
    (tmp_path / "memory_subject.py").write_text(SUBJECT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ballast = bytearray(b"x" * 800_000_000)  # a peak of this process, which the child must not inherit
    assert peak_rss_mb() > 800
    del ballast
    with Isolated("memory_subject:Subject", threads=1, timeout_s=60) as process:
        before = process.call("peak")
        after = process.call("fill_and_free", megabytes=300)
        assert process.call("peak") == after
    assert 20 < before < 800
    assert after - before == pytest.approx(300, abs=10)


def test_fallback_without_proc(monkeypatch):
    """Kilobytes on Linux, bytes on macOS."""
    monkeypatch.setattr(memory, "Path", lambda _: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=250_000))
    assert peak_rss_mb() == 256
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform="darwin"))
    assert peak_rss_mb() == 0.25


def described(layout: str, shapes: dict | None = None, **config: int) -> Description:
    return Description(
        "float32", shapes=shapes or {}, config=AutoConfig.for_model(layout, **config).to_dict()
    )


def test_kv_cache_by_hand():
    # The embedded model: 30 layers x 3 heads x 64 numbers x keys and values x 4 bytes = 46,080 bytes a token.
    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    embedded = described("llama", **sizes)
    assert kv_cache_mb_per_1k(embedded) == pytest.approx(46.08)
    assert kv_cache_mb_per_1k(embedded, bytes_per_value=2) == pytest.approx(23.04)
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}  # Llama-2-7B
    assert kv_cache_mb_per_1k(described("llama", **sizes), 2) == pytest.approx(524.288)


def test_a_layer_with_fewer_heads_keeps_fewer_keys_and_values():
    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    narrow = {
        f"model.layers.4.self_attn.{part}": [64, 576] for part in ("k_proj", "v_proj")
    }  # 1 head instead of 3
    saved = 2 * 2 * 64 * 4 * 1000 / 1e6
    assert kv_cache_mb_per_1k(described("llama", narrow, **sizes)) == pytest.approx(46.08 - saved)


def test_kv_cache_equals_the_bytes_of_a_real_one(layout, folder_of):
    model = reference.load(str(folder_of(layout))).model
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(
            torch.zeros(1, 1000, dtype=torch.int64), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    about = Description("float32", config=model.config.to_dict())
    assert kv_cache_mb_per_1k(about) == pytest.approx(held / 1e6)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "mistral"])
def test_a_layer_with_a_window_keeps_no_more_than_it(new_model, name):
    """Every second layer of Gemma's, and all of Mistral's, look back 24 tokens here; engines keep all."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if name != "mistral" else {}
    model = new_model(name, sliding_window=24, num_hidden_layers=2, **kinds)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for piece in (900, 100):
            model.base_model(torch.ones(1, piece, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    about = Description("float32", config=model.config.to_dict())
    assert kv_cache_mb_per_1k(about) == pytest.approx(held / 1e6)
    whole = kv_cache_mb_per_1k(about, windows=False)
    assert held / 1e6 / whole == pytest.approx(23 / 1000 if name == "mistral" else (23 + 1000) / 2000)
