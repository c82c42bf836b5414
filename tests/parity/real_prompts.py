"""Twenty prompts of several languages, kinds and lengths, for the real checkpoints."""

from __future__ import annotations

LONG = (
    "A pipeline of stages holds the layers of one model on several machines. Each stage receives the hidden states of "
    "the one before it, runs its own layers, and sends its hidden states on. Nobody needs a fast interconnect, because "
    "what travels between two stages is small: one vector a token. "
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small",
    "def quicksort(values):\n    ",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self",
    "Die Hauptstadt von Österreich ist",
    "La recette de la tarte aux pommes commence par",
    "Напиши короткое стихотворение о зиме:",
    "今天天气很好,我们",
    "日本の首都は",
    "مرحبا، كيف",
    "1, 1, 2, 3, 5, 8, 13,",
    "x",
    "\n\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "Question: What is 17 * 23?\nAnswer:",
    "🙂🙃 emoji and é combining",
    "| a | b |\n|---|---|\n| 1 |",
    LONG,
    LONG * 3 + "In short:",
    '{"name": "Ada", "born": 1815, "known_for":',
)
