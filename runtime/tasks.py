"""What kind of request a prompt is, where nobody said: keywords, as eMoE tells tasks apart (arXiv 2503.06823)."""

from __future__ import annotations

import re

DEFAULT = "default"
"""The task of a prompt that no rule knows."""

_EDGE = 400  # characters at either end, where an instruction stands; what is between is what it is about

# The first task that has a keyword counts: "Summarise this conversation" asks for a summary.
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "summarise": (
        r"summari[sz](?:e|es|ing)",
        r"summar(?:y|ies)",
        r"tl;?dr",
        "main points",
        "key takeaways",
        "condense",
    ),
    "classify": (
        r"classif(?:y|ies|ied|ication)",
        r"categori(?:s|z)e",
        r"(?:which|one of (?:the|these)(?: following)?) (?:categor(?:y|ies)|class(?:es)?|labels?)",
        r"sentiments?",
        r"(?:positive|negative)(?:,|,? or| and|/) ?(?:very )?(?:positive|negative|neutral)",
        "spam or",
    ),
    "compare": (
        r"compar(?:e|ing|ison)",
        r"similar(?:ity)?",
        r"paraphrases?",
        r"(?:same|equivalent)(?: in)? meaning",
        "mean the same",
        r"differences? between",
    ),
    "converse": (
        r"(?:user|human|assistant|customer|agent) ?:",
        r"let'?s (?:chat|talk)",
        "how are you",
        r"(?:hi|hello|hey)(?: there)? ?[,.!]",
        r"you are an? (?:\w+ )?(?:assistant|chatbot)",
        r"conversations?",
        r"role-?play",
        r"(?:act|speak|respond) (?:as|like) an?",
        r"(?:imagine|pretend|picture) yourself",
        r"(?:assume|embody|embrace|play|take on) the (?:role|persona) of",
    ),
    "answer": (
        r"(?:who|whom|whose|what|when|where|which|why|how)(?:'s)? [^?]{2,300}\?",
        r"(?:is|are|was|were|does|did|do|has|have|can) [^?]{2,300}\?",
        r"questions? ?:",
        r"answer (?:the|this|these)",
        "true or false",
    ),
}
_RULES = {
    task: re.compile(rf"(?<!\w)(?:{'|'.join(keywords)})(?!\w)", re.IGNORECASE) for task, keywords in _KEYWORDS.items()
}


def task_of(prompt: str) -> str:
    """The task that a prompt's keywords tell: summarise, classify, compare, converse, answer, or `DEFAULT`.

    Only the beginning and the end of a long prompt are looked at.
    """
    edges = (prompt,) if len(prompt) <= 2 * _EDGE else (prompt[:_EDGE], prompt[-_EDGE:])
    for task, rule in _RULES.items():
        if any(rule.search(edge) for edge in edges):
            return task
    return DEFAULT
