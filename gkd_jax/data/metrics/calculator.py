"""An external calculator for generated equations, without `eval`.

Cobbe et al., "Training Verifiers to Solve Math Word Problems" (arXiv 2110.14168) and Wei et al.,
"Chain-of-Thought Prompting Elicits Reasoning in Large Language Models" (arXiv 2201.11903) evaluate
models with a calculator: the right-hand side of each generated equation is computed. If the number
in the text is wrong, the correct number replaces it there and in the following text. If it is
uncertain whether a text is an equation (it has units, percentages, mixed numbers or words), it is
unchanged.
"""

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
"""A number in common notation: 7, 1,234, 0.5, .5. A full stop after a number is not matched."""

MINUS_SIGN = "\N{MINUS SIGN}"
_TIMES_SIGN = "\N{MULTIPLICATION SIGN}"
_DIVISION_SIGN = "\N{DIVISION SIGN}"
_SAME_OPERATOR = {_TIMES_SIGN: "*", "x": "*", _DIVISION_SIGN: "/", MINUS_SIGN: "-"}

_TOKEN = re.compile(
    rf"(?P<number>{NUMBER})"
    rf"|(?P<operator>[-+*/{_TIMES_SIGN}{_DIVISION_SIGN}{MINUS_SIGN}]|(?<=[\d\s)])x(?=[\s$\d(]))"
    r"|(?P<paren>[()])"
    r"|(?P<equals>=)"
    r"|(?P<blank>[ \t$]+)"
    r"|(?P<close>>>)"
    r"|(?P<other>\w+|[^\w])",
    re.DOTALL,
)
# Limits on expressions, so that a degenerate output does not cost time or memory.
_MAX_TOKENS = 64
_MAX_NUMBER_LENGTH = 18


@dataclasses.dataclass
class _Token:
    kind: str
    text: str
    start: int
    end: int
    replacement: str | None = None


def to_fraction(number: str) -> Fraction:
    """Returns the exact value of a number that `NUMBER` matches."""
    return Fraction(Decimal(number.replace(",", "")))


def apply_calculator(text: str) -> str:
    """Corrects the right-hand sides of equations in a generated solution.

    Handles 'a + b = c' and GSM8K's annotations '<<a+b=c>>c', with + - * / and their typographic
    forms, parentheses, dollar signs and thousands separators. A right-hand side with decimals is
    kept if it is the result rounded to the same number of decimals. A corrected number replaces the
    wrong one in later equations and in the answer. From the first later equation whose correct
    result is that same number, it is no longer replaced.

    Args:
      text: a generated solution.

    Returns:
      The text with corrected numbers, otherwise unchanged.
    """
    tokens = _tokenize(text)
    corrected: dict[Fraction, Fraction] = {}
    for i, token in enumerate(tokens):
        if token.kind == "equals":
            _correct_equation(tokens, i, corrected)
        elif token.kind == "number" and token.replacement is None:
            value = corrected.get(to_fraction(token.text))
            if value is not None:
                token.replacement = _format(value)
    pieces = []
    position = 0
    for token in tokens:
        if token.replacement is not None:
            pieces += [text[position : token.start], token.replacement]
            position = token.end
    return "".join([*pieces, text[position:]])


def _tokenize(text: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind == "number" and len(match.group()) > _MAX_NUMBER_LENGTH:
            kind = "other"
        if kind != "blank":
            tokens.append(_Token(kind, match.group(), match.start(), match.end()))
    return tokens


def _correct_equation(
    tokens: list[_Token], equals: int, corrected: dict[Fraction, Fraction]
) -> None:
    """Corrects the equation around tokens[equals], if there is one, and records the correction."""
    expression = _left_side(tokens, equals)
    value = _evaluate(expression) if expression else None
    right = _right_side(tokens, equals)
    if value is None or right is None:
        return
    negative = tokens[right - 1].kind == "operator"
    shown = tokens[right].text
    written = -to_fraction(shown) if negative else to_fraction(shown)
    decimals = len(shown.partition(".")[2])
    if value == written or (decimals and abs(value - written) * 2 * 10**decimals <= 1):
        corrected.pop(written, None)
        tokens[right].replacement = shown
        result = shown
    else:
        corrected[written] = value
        corrected.pop(value, None)
        result = _format(value)
        tokens[right].replacement = result
        if negative:
            tokens[right - 1].replacement = ""
    # The number after an annotation '<<a+b=c>>' repeats c.
    after = tokens[right + 1 : right + 3]
    if [token.kind for token in after] == ["close", "number"]:
        after[1].replacement = result


def _left_side(tokens: list[_Token], equals: int) -> list[_Token]:
    """Returns the tokens of the expression before tokens[equals]; empty if it is ambiguous."""
    first = equals
    while first and tokens[first - 1].kind in ("number", "operator", "paren"):
        first -= 1
    run = tokens[first:equals]
    before = tokens[first - 1] if first else None
    line_start = before is None or before.text == "\n"
    if run and run[0].kind == "operator":
        minus = _SAME_OPERATOR.get(run[0].text, run[0].text) == "-"
        attached = len(run) > 1 and run[0].end == run[1].start
        if line_start and not attached:
            run = run[1:]  # A dash or star that starts an item of a list.
        elif not (minus and attached) or (before is not None and before.text[-1].isalnum()):
            return []  # A word or a unit separates the operator from its left operand.
    elif run and first > 1 and before is not None and before.text != "\n":
        glued = tokens[first - 2].end == before.start and before.end == run[0].start
        if tokens[first - 2].kind == "number" and (glued or before.text == "and"):
            return []  # A time of day, a ratio, a mixed number ('12 x 1 and 1/4').
    return run if len(run) <= _MAX_TOKENS else []


def _right_side(tokens: list[_Token], equals: int) -> int | None:
    """Returns the index of the number that an equation states as its result.

    Returns None if there is no number, or if the equation continues after the number.
    """
    index = equals + 1
    if index < len(tokens) and tokens[index].text in ("-", MINUS_SIGN):
        index += 1
    if index >= len(tokens) or tokens[index].kind != "number":
        return None
    follow = tokens[index + 1 : index + 3]
    # A percentage, a mixed number ('2 1/2', '5 and 2/3'), a time of day.
    if follow and (follow[0].text in ("%", "and", ":") or follow[0].kind == "number"):
        return None
    continues = len(follow) == 2 and follow[0].kind == "operator"
    return None if continues and follow[1].kind in ("number", "paren") else index


def _evaluate(tokens: list[_Token]) -> Fraction | None:
    """Returns the value of an expression; None if it is invalid or has no operation."""
    items: list[Fraction | str] = []
    for token in tokens:
        text = token.replacement if token.replacement is not None else token.text
        if token.kind == "number":
            negative = text.startswith("-")
            number = to_fraction(text.removeprefix("-"))
            items.append(-number if negative else number)
        else:
            items.append(_SAME_OPERATOR.get(text, text))
    if sum(isinstance(item, Fraction) for item in items) < 2:
        return None
    try:
        value, rest = _sum(items)
    except (SyntaxError, ZeroDivisionError):
        return None
    return None if rest else value


def _sum(items: list[Fraction | str]) -> tuple[Fraction, list[Fraction | str]]:
    value, rest = _product(items)
    while rest and rest[0] in ("+", "-"):
        term, after = _product(rest[1:])
        value = value + term if rest[0] == "+" else value - term
        rest = after
    return value, rest


def _product(items: list[Fraction | str]) -> tuple[Fraction, list[Fraction | str]]:
    value, rest = _factor(items)
    while rest and rest[0] in ("*", "/"):
        factor, after = _factor(rest[1:])
        value = value * factor if rest[0] == "*" else value / factor
        rest = after
    return value, rest


def _factor(items: list[Fraction | str]) -> tuple[Fraction, list[Fraction | str]]:
    if not items:
        raise SyntaxError("an operand is missing")
    head, rest = items[0], items[1:]
    if isinstance(head, Fraction):
        return head, rest
    if head == "-":
        value, rest = _factor(rest)
        return -value, rest
    if head == "(":
        value, rest = _sum(rest)
        if rest and rest[0] == ")":
            return value, rest[1:]
    raise SyntaxError(f"no operand starts with {head!r}")


def _format(value: Fraction) -> str:
    """Formats a value without exponent or trailing zeros, with at most ten decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    decimal = round(Decimal(value.numerator) / Decimal(value.denominator), 10)
    return f"{decimal:f}".rstrip("0").rstrip(".")
