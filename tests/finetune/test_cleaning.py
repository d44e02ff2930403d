"""Repairs and filters of text, in no language in particular."""

import pytest

from fastft.finetune.cleaning import Filters, compression, letter_share, reason_against, repair


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cafÃ© â€” l&apos;Ã©tÃ©", "café — l'été"),
        ("a\x00b\x1b[31mred\x1b[0m", "abred"),
        ("e\u0301", "é"),
        ("“quoted” ﬁne Ｗｉｄｅ", "“quoted” ﬁne Ｗｉｄｅ"),
        ("half \ud83d, whole \ud83d\ude00", "half �, whole 😀"),
        ("if a < b:\n\tc = '&amp;'", "if a < b:\n\tc = '&amp;'"),
    ],
)
def test_fix(text, expected):
    assert repair(True, "NFC")(text) == expected


def test_without_fix_only_the_form_changes():
    assert repair(False, "none")("cafÃ© e\u0301 ﬁ \ud83d") == "cafÃ© e\u0301 ﬁ �"
    assert repair(False, "NFC")("e\u0301 ﬁ") == "é ﬁ"
    assert repair(False, "NFKC")("e\u0301 ﬁ") == repair(True, "NFKC")("e\u0301 ﬁ") == "é fi"


@pytest.mark.parametrize(
    "text, filters, reason",
    [
        (" \n", Filters(), "empty"),
        ("ab ", Filters(least=3), "shorter than 3 characters"),
        ("abc", Filters(least=3, most=3), None),
        ("abcd", Filters(most=3), "longer than 3 characters"),
        ("!!! a", Filters(letters=0.25), None),
        ("!!!! a", Filters(letters=0.25), "less than 25% letters and digits"),
        ("buy now! " * 40, Filters(), "repeats itself"),
        ("buy now! " * 40, Filters(compression=100), None),
        ("a" * 60, Filters(), None),
    ],
)
def test_reasons(text, filters, reason):
    assert reason_against(text, filters) == reason


def test_letters_of_every_script():
    for text in ("नमस्ते दुनिया", "你好世界", "สวัสดี", "مَرْحَبًا", "abc 123"):
        assert letter_share(text) == 1
    assert letter_share("") == 0 and letter_share("ab--") == 0.5


def test_prose_is_far_from_repeating_itself():
    prose = " ".join(str(2**i) for i in range(200))
    assert 1.5 < compression(prose) < 5 < compression("the same. " * 50)
