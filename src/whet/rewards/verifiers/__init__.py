"""Ready-made rewards, which check answers by rules. Each is a frozen record of options and is called as a reward function is."""

from whet.rewards.verifiers.base import Verdict, Verifier
from whet.rewards.verifiers.exact_match import ExactMatch
from whet.rewards.verifiers.json_schema import JsonSchema
from whet.rewards.verifiers.language import Language
from whet.rewards.verifiers.length import Length
from whet.rewards.verifiers.math_match import MathMatch
from whet.rewards.verifiers.numeric_match import NumericMatch
from whet.rewards.verifiers.regex import Regex
from whet.rewards.verifiers.repetition import Repetition
from whet.rewards.verifiers.sentiment import Sentiment
from whet.rewards.verifiers.unit_tests import UnitTests

__all__ = [
    "ExactMatch", "JsonSchema", "Language", "Length", "MathMatch", "NumericMatch", "Regex", "Repetition", "Sentiment", "UnitTests",
    "Verdict", "Verifier",
]  # fmt: skip
