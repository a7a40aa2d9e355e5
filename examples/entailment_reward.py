"""A custom reward: how much of a summary is supported by its article.

RL with GKD in the GKD paper (On-Policy Distillation of Language Models, arXiv 2306.13649) rewards a
summary by the probability that the article entails it, as given by a large NLI model.
`supported_words` is a placeholder for that model: the share of the summary's content words that
occur in the article. It ignores grammar and negation, and rewards copied sentences most.

To use a real model, keep the signature and score all pairs at once:

    def entailment(prompts, references, samples):
        return [float(p) for p in my_nli_model(premises=prompts, hypotheses=samples)]

`examples/entailment_reward.gin` uses this reward.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
# Function words, which carry no content.
_FUNCTION_WORD = re.compile(
    "an?|and|are|as|at|be|been|but|by|for|from|had|has|have|he|her|his|in|is|its?|of|on|or|she|"
    "that|the|their|they|this|to|was|were|which|who|will|with"
)


def supported_words(
    prompts: Sequence[str], references: Sequence[tuple[str, ...]], samples: Sequence[str]
) -> list[float]:
    """Computes the share of each summary's content words that occur in its article.

    Args:
      prompts: articles.
      references: not used, since factuality needs no reference.
      samples: summaries.

    Returns:
      A number from 0 to 1 for each summary; 0 for a summary without content words.
    """
    del references
    rewards = []
    for article, summary in zip(prompts, samples, strict=True):
        said = [word for word in _words(summary) if not _FUNCTION_WORD.fullmatch(word)]
        known = set(_words(article))
        rewards.append(sum(word in known for word in said) / len(said) if said else 0.0)
    return rewards


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
