"""A tokenizer of one token a byte, for tests in which tokens are read by eye."""

from typing import ClassVar


class Letters:
    """A tokenizer of one token a byte; 0 ends a text."""

    bos_token_id = None
    eos_token_id = 0
    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode(errors="replace").replace("\0", "")
