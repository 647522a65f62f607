"""When two different argument values mean the same: the rule for `Synonyms` of Table 1.

The paper names the class ("synonymous with standard values") and no rule. Ours is a heuristic on words, written down in
docs/evaluation.md; it judges nothing but this statistic, never a score.
"""

import re
import unicodedata
from collections.abc import Sequence

from eval.metrics import equal_lenient

SHARED_WORDS = 0.5  # two texts are synonymous from this share of common words on (rule 6)
LONGEST = 2000  # characters of a value that are looked at

# One meaning per line: the codes and short forms that tool documents ask for. Words of several letters only where no
# other meaning is common.
_EQUIVALENTS = tuple(
    frozenset(line.split(","))
    for line in (
        "en,eng,eng latn,en us,en gb,english",
        "de,deu,ger,german,deutsch",
        "fr,fra,fre,fra latn,french",
        "es,spa,spa latn,spanish",
        "it,ita,italian",
        "pt,por,portuguese",
        "ru,rus,russian",
        "zh,zh cn,chi,zho,zho hans,chinese,simplified chinese",
        "ja,jp,jpn,jpn jpan,japanese",
        "ko,kor,korean",
        "ar,ara,arabic",
        "hi,hin,hindi",
        "us,usa,united states,united states of america,america",
        "uk,gb,gbr,united kingdom,great britain,britain",
        "cn,chn,china",
        "japan,jp,jpn",
        "deu,germany,de",
        "fra,france,fr",
        "ind,india",
        "can,canada,ca",
        "au,aus,australia",
        "nyc,new york,new york city",
        "la,los angeles",
        "sf,san francisco",
        "usd,us dollar,us dollars,dollar,dollars",
        "eur,euro,euros",
        "gbp,pound,pounds,british pound",
        "jpy,yen,japanese yen",
        "cny,rmb,yuan,chinese yuan",
        "celsius,c,metric",
        "fahrenheit,f,imperial",
        "km,kilometer,kilometers,kilometre,kilometres",
        "mi,mile,miles",
        "kg,kilogram,kilograms",
        "m,meter,meters,metre,metres",
        "jan,january",
        "feb,february",
        "mar,march",
        "apr,april",
        "jun,june",
        "jul,july",
        "aug,august",
        "sep,sept,september",
        "oct,october",
        "nov,november",
        "dec,december",
        "1,true,yes,on",
        "0,false,no,off",
        "asc,ascending",
        "desc,descending",
        "max,maximum",
        "min,minimum",
    )
)
_FUNCTION_WORDS = frozenset(
    (
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "for",
        "to",
        "from",
        "by",
        "with",
        "and",
        "or",
        "is",
        "are",
        "about",
        "please",
    )
)
_NEGATIONS = frozenset(("not", "no", "never", "without", "except", "non"))
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_SEPARATOR = re.compile(r"[\s,;]+")
_ADDRESS = re.compile(r"\w[./@]\w")


def is_synonym(predicted: object, gold: object) -> bool:
    """True if the two values mean the same by one of the rules below, tried in order.

    1. Equal but for quotes around numbers and truth values, letter case, blanks at the ends.
    2. A list against a list, a dict against a dict: every item has a synonym of its own; order does not matter. A
       list against a text: the list's items joined by blanks.
    3. The same words: after Unicode NFKC and lower case, whatever is neither letter nor digit only separates.
    4. A code and what it means, by the table above ("jpn_Jpan" and "Japanese"), or by initials ("WHO").
    5. Otherwise both must hold the same numbers and the same negations: "top 5" and "top 10" are not synonymous.
    6. Then half of the words, function words aside and plurals as singulars, must be common, or all words of one be
       in the other ("Paris" and "Paris, France").
    Absent values (None, "") are synonymous with nothing.
    """
    if equal_lenient(predicted, gold):
        return True
    if predicted in (None, "", [], {}) or gold in (None, "", [], {}):
        return False
    if isinstance(predicted, dict) or isinstance(gold, dict):
        return (
            isinstance(predicted, dict)
            and isinstance(gold, dict)
            and predicted.keys() == gold.keys()
            and all(is_synonym(predicted[key], gold[key]) for key in gold)
        )
    if isinstance(predicted, list) and isinstance(gold, list):
        return _same_items(predicted, gold)
    return _same_meaning(_text(predicted), _text(gold))


def _same_items(predicted: list, gold: list) -> bool:
    if len(predicted) != len(gold):
        return False
    left = list(gold)
    for item in predicted:
        found = next((index for index, other in enumerate(left) if is_synonym(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _text(value: object) -> str:
    try:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    except RecursionError:  # a model's answer may be nested as deeply as it likes
        return ""
    return unicodedata.normalize("NFKC", text[:LONGEST]).lower()


def _same_meaning(predicted: str, gold: str) -> bool:
    first, second = _WORD.findall(predicted), _WORD.findall(gold)
    if not first or not second:
        return False
    if "".join(first) == "".join(second) or any({" ".join(first), " ".join(second)} <= group for group in _EQUIVALENTS):
        return True
    if _is_initials(first, second) or _is_initials(second, first):
        return True
    if _NEGATIONS & set(first) != _NEGATIONS & set(second) or _numbers(first) != _numbers(second):
        return False
    sets = [_content_words(text) for text in (predicted, gold)]
    common = sets[0] & sets[1]
    return any(not word.isdecimal() for word in common) and (
        len(common) == min(map(len, sets)) or len(common) >= SHARED_WORDS * len(sets[0] | sets[1])
    )


def _content_words(text: str) -> set[str]:
    """The words that count in rule 6. An address or a path is one word: www.a.com and www.b.com share nothing."""
    words: set[str] = set()
    for piece in _SEPARATOR.split(text):
        if _ADDRESS.search(piece) and not _WORD.fullmatch(piece):
            words.add(piece.strip("./"))
        else:
            words |= {_singular(word) for word in _WORD.findall(piece) if word not in _FUNCTION_WORDS}
    return words


def _is_initials(short: Sequence[str], long: Sequence[str]) -> bool:
    return (
        len(short) == 1
        and len(long) > 1
        and short[0].isalpha()
        and short[0]
        in ("".join(word[0] for word in long), "".join(word[0] for word in long if word not in _FUNCTION_WORDS))
    )


def _numbers(words: Sequence[str]) -> list[float]:
    return sorted(float(word) for word in words if word[0].isdecimal() and len(word) <= 40)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
