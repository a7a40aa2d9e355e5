"""A reward of one's own: how far a summary says only what its article supports.

GKD (arXiv 2306.13649, RL with GKD) rewards a summary by the probability that the article entails
it, which a large NLI model gives. `supported_words` stands in for that model without any: the share
of the summary's content words that occur in the article. It sees no grammar and no negation, and a
copied sentence earns the most; it shows where your model goes, and no more.

For a real one keep the signature and score all pairs at once:

    def entailment(prompts, references, samples):
        return [float(p) for p in my_nli_model(premises=prompts, hypotheses=samples)]

Use: examples/entailment_reward.gin.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
# Words that say nothing of what is reported.
_FUNCTION_WORD = re.compile(
    "an?|and|are|as|at|be|been|but|by|for|from|had|has|have|he|her|his|in|is|its?|of|on|or|she|"
    "that|the|their|they|this|to|was|were|which|who|will|with"
)


def supported_words(
    prompts: Sequence[str], references: Sequence[tuple[str, ...]], samples: Sequence[str]
) -> list[float]:
    """The share of each summary's content words that its article has; 0 for one without any.

    Args:
      prompts: the articles.
      references: not read: factuality needs no reference.
      samples: the summaries.

    Returns:
      A number from 0 to 1 for each summary.
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
