"""The methods that an evaluation compares: their names, how they are called and what each of them is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

RIGHT = "right"
SHUFFLED = "shuffled"
CONSTANT = "constant"
MEAN = "mean"
NO_SOFT_TOKEN = "no_soft_token"
GAIN = "gain"  # of a candidate's text: its likelihood with a soft token less that without one
GAIN_SHUFFLED = "gain_shuffled"
REFERENCE = "reference"  # the users' own texts, measured as a method's texts are


@dataclass(frozen=True, slots=True)
class MethodWords:
    """How a method is called in tables, and what it is."""

    label: str
    explanation: str


METHOD_WORDS = {
    RIGHT: MethodWords("right user", "the soft token of the user whom the text is for"),
    SHUFFLED: MethodWords("shuffled user", "the soft token of another user: what is lost is personal"),
    MEAN: MethodWords("mean user", "the soft token of the mean user embedding"),
    NO_SOFT_TOKEN: MethodWords("no soft token", "the prompt alone"),
    CONSTANT: MethodWords(
        "constant token", "one learned token for all users, trained as long: the task without the user"
    ),
    "profile_text": MethodWords("profile as text", "the user's taste in words in the prompt"),
    "profile_text_constant": MethodWords("profile + constant", "the same words, and one learned token for all users"),
    "prefix_tuning": MethodWords("prefix tuning", "learned keys and values for all users in every layer"),
    "lora": MethodWords("LoRA", "low-rank changes of the base model, for all users"),
    "lora_profile_text": MethodWords("LoRA + profile", "the same, trained with the user's taste in words"),
    GAIN: MethodWords("right user's gain", "likelihood with the right user's soft token less that without one"),
    GAIN_SHUFFLED: MethodWords("shuffled user's gain", "the same with the soft token of another user"),
    REFERENCE: MethodWords("users' own texts", "the references, measured in the same way"),
}


def label_of(method: str) -> str:
    """A method's label; an unknown one is shown as it is."""
    return METHOD_WORDS[method].label if method in METHOD_WORDS else method


def explanation_of(method: str) -> str:
    """What a method is; nothing for an unknown one."""
    return METHOD_WORDS[method].explanation if method in METHOD_WORDS else ""


def in_order(methods: Iterable[str]) -> list[str]:
    """Known methods in the order above, then the others by name."""
    known = list(METHOD_WORDS)
    return sorted(set(methods), key=lambda method: (known.index(method) if method in known else len(known), method))
