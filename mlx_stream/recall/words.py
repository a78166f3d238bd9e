"""Text -> the words that are indexed and searched; independent of the index.

The index splits text at everything but letters and digits, and stems English words. Text in scripts
in which it would not find the words, such as Chinese, is first split into bigrams:

    "我的狗叫小白" is indexed as "我的 的狗 狗叫 叫小 小白"
"""

import re
import unicodedata

# Runs of text in scripts that do not put spaces between words, that attach endings to words
# (Korean), or that write vowels as marks (Hindi).
UNSPACED = re.compile(
    "[\u0900-\u0eff\u1000-\u109f\u1780-\u17ff\u1980-\u19df"  # Indic, Thai, Lao, Burmese, Khmer
    "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"  # Hangul
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"  # Han
)
# Marks that many writers leave out: accents, Hebrew and Arabic vowels, Vedic signs.
MARKS = re.compile("[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u1cd0-\u1cff]")
WORD = re.compile(r"[^\W_]+")
# Words that say little about a question's subject, and greetings: English, then the question words
# and pronouns of other languages, except those that mean something else in another language.
STOP_WORDS = frozenset(
    re.findall(
        WORD,
        """
    a about after again ain all also always am an and another any anything are aren as ask asked
    at away be because been before being bit but by bye can continue could couldn d did didn do
    does doesn doing don done down each else ever every everything fine for from get give go
    goes going gone good got great had hadn has hasn have haven having he hello help her here
    hers hey hi him his how i if in into is isn it its just know known let like ll lot lots m
    made make many may maybe me might mine more most much must my name named need never nice no
    nor not nothing now of off oh ok okay on one only or other our ours out over please re
    really s said say see shall she should shouldn so some something sorry such sure t tell than
    thank thanks that the their them then there these they thing things think this those to
    today tomorrow tonight too up us use used ve very want was wasn way we well were weren what
    when where which while who whom whose why will with won would wouldn yes yet you your yours

    der das den dem des ein eine einen einem einer wie wo wer wann warum welche welcher welches ist
    sind ich du er sie es wir ihr mein meine meinen meiner und oder nicht im am auf mit zu von heißt
    le la les un une du de et est que qui quoi où quand comment quel quelle mon ma mes je tu il elle
    el los las una qué quién cuándo dónde cómo cuál mi mis yo
    как где кто что когда какой какая какое какие какого я ты он она мы вы мой моя моё мои мою моей
    моего в на и не это есть ли зовут
    ما ماذا متى أين كيف هل هي هو في على إلى لماذا كم
    名字 名前 이름 름이 어디 디에 언제 무슨 누구 어떤 있어
    """,
    )
)
GREETINGS = frozenset(
    WORD.findall("bye good hello hey hi no oh ok okay please sorry thank thanks yes")
)
# Bigrams that also say little: hiragana only (word endings), or with a common function character.
STOP_BIGRAM = re.compile("[\u3040-\u309f]{2}|.?[的是么什哪吗呢了在我你他她谁怎何뭐예요까].?")
# The longest text to index, in characters; anything beyond that is not found.
LONGEST_TEXT = 2**18


def indexed_text(text: str) -> str:
    """Return text in the form in which it is indexed."""
    text = text[:LONGEST_TEXT]
    if text.isascii():
        return text.replace("\0", " ")
    text = MARKS.sub("", unicodedata.normalize("NFKC", text))
    return UNSPACED.sub(in_bigrams, text).replace("\0", " ")


def in_bigrams(run: re.Match[str]) -> str:
    text = run[0]
    pairs = (text[at : at + 2] for at in range(max(1, len(text) - 1)))
    return f" {' '.join(pairs)} "


def content_words(question: str) -> list[str]:
    """Return the distinct words of a question that say what it is about, in order."""
    return list(filter(is_content, all_words(question)))


def all_words(question: str) -> list[str]:
    """Return the distinct words of a question, lowercase, in order."""
    words = (match[0].lower() for match in WORD.finditer(indexed_text(question)))
    return list(dict.fromkeys(words))


def is_greeting(question: str) -> bool:
    """Return whether a question is no more than a greeting, thanks or the like."""
    words = {match[0].lower() for match in WORD.finditer(question[:LONGEST_TEXT])}
    return bool(words & GREETINGS) and not any(map(is_content, words))


def is_content(word: str) -> bool:
    """Return whether a lowercase word says what a question is about."""
    if word.isascii():
        return word not in STOP_WORDS and (len(word) > 1 or word.isdigit())
    return word not in STOP_WORDS and not STOP_BIGRAM.fullmatch(word)
