"""Personal data in a text: where it stands, and of what kind. English and Chinese forms.

Patterns find candidates; a checksum, a calendar, a list of lengths or of number plans says which are real: cards by
Luhn (ISO/IEC 7812), IBAN by modulus 97 (ISO 13616), Chinese resident ids by ISO 7064 MOD 11-2 (GB 11643), telephone
numbers by the number plans that come with ``phonenumbers``. Names and addresses have none: those are found by the
words around them, so many are missed; a column of names has to be declared.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tasks.spec.privacy import Kind


class Found(NamedTuple):
    """One finding: ``text[start:end]``, and the one way of writing it, by which two are compared."""

    kind: Kind
    start: int
    end: int
    canonical: str


# A text without its kind's hint (RE2) can't hold it: most texts are never looked at closer.
HINTS: dict[Kind, str] = {
    "email": r"@",
    "phone": r"\pN[\pN \-–().（）/]{5,}\pN",
    "name": r"(?i)\b(mr|mrs|ms|miss|dr|prof)\b|\bname is\b|姓名|名字|我叫|联系人|收件人|先生|女士|小姐|老师|医生",
    "card": r"(\pN[ -]?){12}\pN",
    "iban": r"\b[A-Z]{2}\d{2} ?[A-Z0-9]{4}",
    "ip": r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f]:[0-9A-Fa-f:]*:|::",
    "address": r"\d.*\b[A-Z][A-Za-z]+\b|(?i)\bbox \d|[路街道巷弄号]",
    "ssn": r"\d{3}[- ]\d{2}[- ]\d{4}|\d{9}",
    "resident_id": r"\pN{17}[\pNXxＸｘ]",
}
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d])")
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
IP4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d]|\.\d)")
IP6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
SSN = re.compile(r"(?<![\d-])\d{3}([- ])\d{2}\1\d{4}(?![\d-])")
SSN_NAMED = re.compile(r"(?i)(?:\bssn|social security)\D{0,20}(\d{9})(?!\d)")
RESIDENT = re.compile(r"(?<![\dA-Za-z])[1-8]\d{16}[\dXxＸｘ](?![\dA-Za-z])")
STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Place|Pl|Terrace|Way|Highway|Hwy|"
    "Parkway|Pkwy|Close|Crescent"
)
ADDRESS = re.compile(
    rf"\b\d{{1,5}}[A-Za-z]?(?: [NSEW]\.?)?(?: [A-Z][\w'.-]{{0,30}}){{1,4}}? (?:{STREETS})\b\.?"
    r"(?:,? (?:Apt|Apartment|Suite|Unit|Flat)\.? ?#?\w{1,6})?(?:, ?[A-Z][A-Za-z' -]{1,30})?"
    r"(?:,? [A-Z]{2} \d{5}(?:-\d{4})?)?"
    r"|\bP\.? ?O\.? Box \d{1,6}\b"
)
HAN = "[\u4e00-\u9fff]"
ADDRESS_CN = re.compile(
    rf"(?:{HAN}{{2,7}}(?:省|自治区))?(?:{HAN}{{2,7}}市)?(?:{HAN}{{1,6}}[区县镇乡])?{HAN}{{1,10}}?(?:大道|胡同|[路街道巷弄])"
    r"\d{1,5}(?:号|弄)(?:(?:\d{1,4}|[A-Z一二三四五六七八九十]{1,3})(?:号楼|单元|[号栋幢楼室层座]))*(?:\d{1,4}室?)?"
)
NAME = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|MR|MRS|MS|DR)\.? ((?:[A-Z][\w'’-]{1,30})(?: [A-Z][\w'’-]{1,30}){0,2})"
    r"|\b[Nn]ame is ((?:[A-Z][\w'’-]{1,30})(?: [A-Z][\w'’-]{1,30}){0,2})"
)
SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢姜崔钟谭"
    "陆汪范金石廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔向汤"
)
NAME_CN = re.compile(
    rf"(?:姓名|名字|我叫|联系人|收件人)(?:是|为)?[:： ]?([{SURNAMES}]{HAN}{{1,2}})(?!{HAN}{{2}}[{SURNAMES}])"
    rf"|([{SURNAMES}]{HAN}{{0,2}}?)(?=先生|女士|小姐|老师|医生)"
)
# How long an IBAN of a country is (the registry of ISO 13616).
IBAN_LENGTHS = dict(
    AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, CH=21, CR=22, CY=28, CZ=24, DE=22, DK=18,
    DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18, GR=27, GT=28, HR=21, HU=28, IE=22,
    IL=23, IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LI=21, LT=20, LU=20, LV=21, MC=27, MD=24, ME=22, MK=19,
    MR=27, MT=31, MU=30, NL=18, NO=15, PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24, SE=24, SI=19, SK=24,
    SM=27, TN=24, TR=26, UA=29, VA=22, VG=24, XK=20,
)  # fmt: skip
PROVINCES = {
    *("11", "12", "13", "14", "15", "21", "22", "23", "31", "32", "33", "34", "35", "36", "37", "41", "42", "43", "44"),
    *("45", "46", "50", "51", "52", "53", "54", "61", "62", "63", "64", "65", "71", "81", "82"),
}
# First digits and lengths that card networks give out.
CARD_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}"
)
PHONE_CUE = re.compile(
    r"(?i)(?:tel|phone|call|mobile|cell|fax|ring|text|whatsapp|contact|电话|手机|联系|致电)\w*[\s:：.(]*(?:\w+ ){0,2}$"
)
CHINESE_MOBILE = re.compile(r"1[3-9]\d{9}")


def find(text: str, kinds: tuple[Kind, ...], regions: tuple[str, ...]) -> list[Found]:
    """Return what stands in a text, in its order; where two kinds claim one place, the surer one has it."""
    taken: list[Found] = []
    for kind in [kind for kind in FINDERS if kind in kinds]:
        for found in FINDERS[kind](text, regions):
            if all(found.end <= other.start or found.start >= other.end for other in taken):
                taken.append(found)
    return sorted(taken, key=lambda found: found.start)


def luhn(digits: str) -> bool:
    """Return whether the last digit is the check digit of the others."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def is_iban(compact: str) -> bool:
    """Return whether an IBAN without its spaces has its country's length and the right check digits."""
    if IBAN_LENGTHS.get(compact[:2]) != len(compact):
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def is_resident_id(number: str) -> bool:
    """Return whether 18 characters are a Chinese resident id: province, a day that was, check character."""
    weights = [2 ** (17 - place) % 11 for place in range(17)]
    if "10X98765432"[sum(int(digit) * w for digit, w in zip(number, weights, strict=False)) % 11] != number[17]:
        return False
    try:
        born = dt.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return number[:2] in PROVINCES and 1900 <= born.year <= 2100


def is_ssn(digits: str) -> bool:
    """Return whether nine digits may be a US social security number (no area 000, 666, 9xx; no group 00)."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def _digits(text: str) -> str:
    """The digits of a text, those of full width and of other scripts too, as 0 to 9."""
    return "".join(str(unicodedata.digit(char)) for char in text if char.isdigit())


def _emails(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in EMAIL.finditer(text):
        yield Found("email", match.start(), match.end(), match.group().lower())


def _ibans(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in IBAN.finditer(text):
        length, end, compact = IBAN_LENGTHS.get(match.group()[:2], 0), match.start(), ""
        while len(compact) < length and end < match.end():
            compact += text[end].strip()
            end += 1
        if is_iban(compact) and not text[end : end + 1].isalnum():
            yield Found("iban", match.start(), end, compact)


def _resident_ids(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in RESIDENT.finditer(text):
        number = unicodedata.normalize("NFKC", match.group()).upper()
        if is_resident_id(number):
            yield Found("resident_id", match.start(), match.end(), number)


def _cards(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in CARD.finditer(text):
        digits = _digits(match.group())
        if CARD_ISSUERS.fullmatch(digits) and luhn(digits):
            yield Found("card", match.start(), match.end(), digits)


def _ssns(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    spans = [match.span() for match in SSN.finditer(text)] + [match.span(1) for match in SSN_NAMED.finditer(text)]
    for start, end in spans:
        if is_ssn(digits := _digits(text[start:end])):
            yield Found("ssn", start, end, digits)


def _ips(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in (*IP4.finditer(text), *IP6.finditer(text)):
        try:
            address = ipaddress.ip_address(match.group())
        except ValueError:
            continue
        # "::" and "a::b" stand in programs; 0.0.0.0 is nobody's.
        if not address.is_unspecified and sum(map(str.isdigit, match.group())) > 1:
            yield Found("ip", match.start(), match.end(), str(address))


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    import phonenumbers

    seen: set[tuple[int, int]] = set()
    for region in regions:
        for match in phonenumbers.PhoneNumberMatcher(text, region):
            span = (match.start, match.end)
            if span not in seen and _is_meant(text, match.start, match.raw_string):
                seen.add(span)
                canonical = phonenumbers.format_number(match.number, phonenumbers.PhoneNumberFormat.E164)
                yield Found("phone", match.start, match.end, canonical)


def _is_meant(text: str, start: int, written: str) -> bool:
    """A run of bare digits may be any number: it needs a plus, a Chinese mobile's form, or a word before it."""
    if not written.isdigit() or written.startswith("00") or CHINESE_MOBILE.fullmatch(_digits(written)):
        return True
    return bool(PHONE_CUE.search(text[max(0, start - 40) : start]))


def _addresses(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in (*ADDRESS.finditer(text), *ADDRESS_CN.finditer(text)):
        yield Found("address", match.start(), match.end(), " ".join(match.group().lower().split()))


def _names(text: str, regions: tuple[str, ...]) -> Iterator[Found]:
    for match in (*NAME.finditer(text), *NAME_CN.finditer(text)):
        start, end = next(match.span(group) for group in (1, 2) if match.group(group))
        yield Found("name", start, end, " ".join(text[start:end].lower().split()))


# The surest first: a checksum before a form, a form before words.
FINDERS: dict[Kind, Callable[[str, tuple[str, ...]], Iterator[Found]]] = {
    "email": _emails,
    "iban": _ibans,
    "resident_id": _resident_ids,
    "card": _cards,
    "ssn": _ssns,
    "ip": _ips,
    "phone": _phones,
    "address": _addresses,
    "name": _names,
}
