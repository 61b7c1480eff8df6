"""Personal data: found in sentences that nobody tuned for, replaced, and put back sign for sign."""

import collections
import ipaddress
import re
import socket
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.deployments.hybrid import privacy, prompts
from edgelab.deployments.hybrid.privacy import (
    Agreement,
    Entity,
    PrivacyError,
    Redacted,
    agreement,
    find,
    iban_remainder,
    leakage,
    luhn_remainder,
    outgoing,
    redact,
    replaced,
)
from edgelab.deployments.hybrid.prompts import Prompt, PromptError, is_right

KINDS = ("email", "phone", "card", "iban", "ip")
SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def presidio():
    pytest.importorskip("presidio_analyzer")


@pytest.fixture(scope="module")
def held_out():
    return prompts.load("held_out")


@pytest.fixture(scope="module")
def found(presidio, held_out):
    """What is found in each held-out prompt."""
    return [find(item.text) for item in held_out]


def entity(text, value, kind="email"):
    begin = text.index(value)
    return Entity(kind, begin, begin + len(value), value)


def item(text="", answer="", asks="other", entities=()):
    return Prompt("train", "one", text, "?", answer, asks, tuple(entities))


# Checks of numbers


def test_luhn_by_hand():
    assert luhn_remainder("79927398713") == 0  # 7+9+9+4+7+6+9+7+7+2+3 = 70
    assert luhn_remainder("4111111111111111") == luhn_remainder("378282246310005") == 0
    assert luhn_remainder("79927398710") == 7


@given(st.text("0123456789", min_size=1, max_size=20), st.data())
def test_luhn_notices_every_wrong_digit(digits, data):
    place = data.draw(st.integers(0, len(digits) - 1))
    other = data.draw(st.sampled_from(sorted(set("0123456789") - {digits[place]})))
    assert luhn_remainder(digits[:place] + other + digits[place + 1 :]) != luhn_remainder(digits)


def test_iban_by_hand():
    assert iban_remainder("GB82WEST12345698765432") == iban_remainder("DE89370400440532013000") == 1
    assert iban_remainder("GB83WEST12345698765432") != 1
    assert iban_remainder("de89370400440532013000") == 1


# The labelled prompts


def test_the_file_is_what_the_function_writes(tmp_path):
    written = prompts.write(tmp_path).read_bytes()
    assert written == (prompts.data_dir() / "privacy" / "prompts.jsonl").read_bytes()
    assert len(written) < 400_000


@pytest.mark.parametrize("split", SPLITS)
def test_reading_gives_what_was_made(split):
    assert prompts.load(split) == prompts.generated(split) != prompts.generated(split, seed=prompts.SEED + 1)


def test_no_template_is_in_both_splits():
    templates = prompts._templates()
    for what in ("name", "text"):
        of = {split: [one[what] for one in templates if one["split"] == split] for split in SPLITS}
        assert not set(of["train"]) & set(of["held_out"])
        assert all(len(set(names)) == len(names) for names in of.values())
    texts = {split: {one.text for one in prompts.load(split)} for split in SPLITS}
    assert not texts["train"] & texts["held_out"]


def test_how_many_there_are(held_out):
    assert len(held_out) == 540 and len({one.template for one in held_out}) == 36
    for split in SPLITS:
        items = prompts.load(split)
        assert sum(not one.entities for one in items) * 3 == len(items)
    counts = collections.Counter(one.kind for item in held_out for one in item.entities)
    assert counts == {"email": 90, "phone": 120, "card": 90, "iban": 90, "ip": 90}
    assert collections.Counter(item.asks for item in held_out) == {"other": 360, "entity": 105, "part": 75}


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_labelled_is_valid_and_nobodys(split):
    networks = [
        *map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"))
    ]
    drama = r"(44)?0?(7700900\d{3}|2079460\d{3}|1134960\d{3}|1314960\d{3})|1?(\d{3})?55501\d\d"
    for prompt in prompts.load(split):
        for one in prompt.entities:
            assert prompt.text[one.begin : one.end] == one.text
            plain = re.sub(r"[\s-]", "", one.text).upper()
            if one.kind == "email":
                assert re.search(r"@([a-z.]+\.)?example\.(com|net|org)$", one.text)
            elif one.kind == "phone":
                assert re.fullmatch(drama, re.sub(r"\D", "", one.text))
            elif one.kind == "card":
                assert luhn_remainder(plain) == 0 and plain.startswith(prompts.CARDS)
            elif one.kind == "iban":
                assert iban_remainder(plain) == 1
                assert len(plain) == 4 + len(prompts.ACCOUNTS[plain[:2]])
                assert plain[4:].startswith(("999", "EDGE", "X99999"))
            else:
                address = ipaddress.ip_address(one.text)
                assert any(address in network for network in networks)


def test_accounts_have_the_lengths_of_their_countries():
    lengths = {
        "AT": 20,
        "BE": 16,
        "CH": 21,
        "DE": 22,
        "ES": 24,
        "FR": 27,
        "GB": 22,
        "IE": 22,
        "IT": 27,
        "NL": 18,
    }
    assert {country: 4 + len(rest) for country, rest in prompts.ACCOUNTS.items()} == lengths


@pytest.mark.parametrize("split", SPLITS)
def test_look_alikes_fail_the_checks(split):
    seen = collections.Counter()
    for prompt in prompts.load(split):
        if prompt.entities:
            continue
        for number in re.findall(r"(?<!\w)\d{4}(?:[ -]?\d{2,6}){2,3}(?!\w)", prompt.text):
            if (digits := re.sub(r"\D", "", number)).startswith(prompts.CARDS):
                assert luhn_remainder(digits)
                seen["card"] += 1
        for code in re.findall(r"(?<!\w)[A-Za-z]{2}\d\d(?: ?[A-Za-z\d]{4}){3,7}", prompt.text):
            assert iban_remainder(code.replace(" ", "")) != 1
            seen["iban"] += 1
        assert not re.search(r"\S@\S+\.(com|net|org)", prompt.text)
        seen["version"] += len(re.findall(r"(?<![\d.])\d+\.\d+\.\d+\.\d+(?![\d.])", prompt.text))
    assert min(seen["card"], seen["iban"], seen["version"]) >= 8


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_where_they_should_be(split):
    for prompt in prompts.load(split):
        values = [one.text for one in prompt.entities]
        sent = replaced(prompt.text, prompt.entities).text
        assert not any(one in other for one in set(values) for other in set(values) - {one})
        if prompt.asks == "other":
            assert prompt.answer in sent
        elif prompt.asks == "entity":
            assert prompt.answer in values and prompt.answer not in sent
        else:
            assert any(prompt.answer in value and prompt.answer != value for value in values)
            assert not re.search(rf"(?<!\w){re.escape(prompt.answer)}(?!\w)", sent)
        assert is_right(prompt.answer, prompt)
        assert not is_right(" ".join([prompt.text] * 4), prompt)
        assert not is_right("I do not know.", prompt)


def test_right_answers():
    card = "Pay 12.50 with 4111 1111 1111 1111."
    number = entity(card, "4111 1111 1111 1111", "card")
    whole, end = item(card, number.text, "entity", [number]), item(card, "1111", "part", [number])
    price = item(card, "12.50", "other", [number])
    assert is_right(" The card 4111-1111-1111-1111.\nQuestion: more", whole)
    assert is_right("**4111111111111111**", whole) and not is_right("41111111111111112", whole)
    assert is_right("\n\nThey are 1111!", end) and not is_right("4111 1111 1111 1111", end)
    assert is_right("It is 12.50 euros", price) and not is_right("It is 112.50", price)
    assert not is_right("", price) and not is_right("Nothing.\n12.50", price)
    city = item("To York.", "York")
    assert is_right("the city of YORK", city) and not is_right("Yorkshire", city)
    assert is_right("york " + "x " * prompts.SPARE_WORDS, city)
    assert not is_right("york x " + "x " * prompts.SPARE_WORDS, city)
    mail = "Write to ada.brandt@example.org."
    address = entity(mail, "ada.brandt@example.org")
    asked = item(mail, address.text, "entity", [address])
    assert is_right("Ada.Brandt@example.org", asked) and not is_right("ada-brandt@example.org", asked)
    assert asked.asked("x") == f"{prompts.EXAMPLE}x\nQuestion: ?\nAnswer:" and mail in asked.asked()


def test_what_cannot_be_made_or_read():
    with pytest.raises(PromptError, match=r"^The prompts have no split 'test'; there are train, held_out\.$"):
        prompts.load("test")
    template = {**prompts._templates()[0], "text": "Sent by {pigeon}."}
    with pytest.raises(PromptError, match=r"^Nothing fills \{pigeon\}; there are email, "):
        prompts.filled(template, prompts._Values(None))


# Replacing and restoring


def test_by_hand():
    text = "From ada@example.org to ben@example.org, copy to ada@example.org, from 192.0.2.1."
    entities = [
        Entity("email", 5, 20, "ada@example.org"),
        Entity("email", 24, 39, "ben@example.org"),
        Entity("email", 49, 64, "ada@example.org"),
        Entity("ip", 71, 80, "192.0.2.1"),
    ]
    redacted = replaced(text, entities)
    assert redacted.text == "From [EMAIL_1] to [EMAIL_2], copy to [EMAIL_1], from [IP_1]."
    assert redacted.entities == tuple(entities)
    assert redacted.placeholders == ("[EMAIL_1]", "[EMAIL_2]", "[EMAIL_1]", "[IP_1]")
    assert redacted.restore(redacted.text) == text
    assert replaced("nothing", []) == Redacted("nothing")


@pytest.mark.parametrize(
    ("answer", "restored"),
    [
        ("[email_1]", "ada@example.org"),
        ("[Email 1]!", "ada@example.org!"),
        ("**[EMAIL_1]**, then", "**ada@example.org**, then"),
        ("EMAIL_1's", "ada@example.org's"),
        ("[EMAIL\\_1]", "ada@example.org"),
        ("[ EMAIL-1 ]", "ada@example.org"),
        ("(email_1)", "(ada@example.org)"),
        ("[[EMAIL_1]]", "[ada@example.org]"),
        ("[EMAIL_1][EMAIL_1]", "ada@example.orgada@example.org"),
        ("[EMAIL_2]", "[EMAIL_2]"),
        ("[EMAIL_11] EMAIL_12", "[EMAIL_11] EMAIL_12"),
        ("[PHONE_1]", "[PHONE_1]"),
        ("email 1 of 3", "email 1 of 3"),
        ("my_email_1", "my_email_1"),
        ("No address is given.", "No address is given."),
        ("", ""),
    ],
)
def test_placeholders_as_a_cloud_may_repeat_them(answer, restored):
    text = "Write to ada@example.org."
    assert replaced(text, [entity(text, "ada@example.org")]).restore(answer) == restored


def test_what_looks_like_a_placeholder_already_stays():
    text = "Fill [EMAIL_1] and email_2 and [Email 4] with ada@example.org or ben@example.org."
    entities = [entity(text, "ada@example.org"), entity(text, "ben@example.org")]
    redacted = replaced(text, entities)
    assert redacted.placeholders == ("[EMAIL_3]", "[EMAIL_5]")
    assert redacted.restore(redacted.text) == text
    assert redacted.restore("[EMAIL_1]: [EMAIL_3]") == "[EMAIL_1]: ada@example.org"


def test_values_are_not_read_again():
    text = r"\1 [IP_1]@example.org \g<0>"
    value = "[IP_1]@example.org"
    redacted = replaced(text, [entity(text, value)])
    assert redacted.restore(redacted.text) == text
    assert replaced("x", [Entity("card", 0, 1, "x")]).restore("card_1") == "x"


PIECE = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "[EMAIL_1]",
            "email_2",
            "[EMAIL_",
            "[",
            "]",
            "EMAIL_",
            "_1]",
            "1",
            "IP_1",
            "[ip 1]",
            "PHONE\\_1",
            "\\",
            "ımaıl_1",
        ]
    ),
)
VALUE = st.one_of(
    st.sampled_from(["ada@example.org", "192.0.2.1", "[EMAIL_1]", "EMAIL_2", "\\1"]),
    st.text(min_size=1, max_size=6),
)


@given(st.lists(st.tuples(PIECE, st.sampled_from(KINDS), VALUE), max_size=6), PIECE)
def test_restoring_is_exact(parts, end):
    text, entities = "", []
    for before, kind, value in parts:
        begin = len(text) + len(before)
        text += before + value
        entities.append(Entity(kind, begin, begin + len(value), value))
    redacted = replaced(text + end, entities)
    assert redacted.restore(redacted.text) == text + end
    same = {}
    for one, placeholder in zip(redacted.entities, redacted.placeholders, strict=True):
        assert same.setdefault((one.kind, one.text), placeholder) == placeholder
        assert redacted.restore(placeholder.lower()) == one.text
    assert len(set(same.values())) == len(same)


# Finding


def test_recall_and_precision_on_sentences_nobody_tuned_for(held_out, found):
    for kind, one in agreement([item.entities for item in held_out], found).items():
        assert one.recall >= 0.95, (kind, one, one.recall_interval())
        assert one.precision >= 0.90, (kind, one, one.precision_interval())


def test_agreement_by_hand():
    text = "a@b.org 192.0.2.1"
    mail, address = entity(text, "a@b.org"), entity(text, "192.0.2.1", "ip")
    longer = Entity("ip", address.begin - 1, address.end, " 192.0.2.1")
    found = agreement([[mail, address], [mail]], [[mail, longer], []])
    assert found["email"] == Agreement(1, 1, 0) and found["ip"] == Agreement(0, 1, 1)
    assert (found["email"].recall, found["email"].precision) == (0.5, 1.0)
    assert found["card"].recall is None and found["card"].recall_interval() is None
    # Wilson by hand, 9 of 10: (0.9 + z²/20 ± z sqrt(0.09/10 + z²/400)) / (1 + z²/10)
    assert Agreement(9, 1, 1).recall_interval() == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert Agreement(9, 1, 0).precision_interval() == pytest.approx((0.7009, 1.0), abs=1e-4)


def test_where_presidio_alone_falls_short(presidio):
    for text, kind, right in [
        ("It runs release 4.18.0.3 now.", "ip", []),
        ("The call ada::add fails.", "ip", []),
        ("Pay with 2223 0031 2200 3222 please.", "card", ["2223 0031 2200 3222"]),
        ("From nl91abna0417164300 today.", "iban", ["nl91abna0417164300"]),
        ("Ada (07700 900123) comes.", "phone", ["07700 900123"]),
        ("Ben (+44 (0)20 7946 0123) comes.", "phone", ["+44 (0)20 7946 0123"]),
        ("It is 555-0142 here.", "phone", ["555-0142"]),
        ("The order 4155550142 is late.", "phone", []),
    ]:
        assert [one.text for one in find(text) if one.kind == kind] == right
        assert [one.text for one in find(text, "presidio") if one.kind == kind] != right


def test_the_nearest_word_decides(presidio):
    assert not find("Order 415-555-0142 is late.")
    assert [one.text for one in find("My order is late, call 415-555-0142.")] == ["415-555-0142"]
    assert [one.text for one in find("It is my order. 415-555-0142.")] == ["415-555-0142"]
    for text in (
        "Version 2 of the server 192.0.2.1",
        "The app at 192.0.2.1 is down.",
        "Update it on 192.0.2.1",
    ):
        assert [one.text for one in find(text)] == ["192.0.2.1"]
    assert not find("Locker 4155550142") and find("Ada, 4155550142") and find("My number 4155550142")


def test_of_two_that_overlap_the_surer_one_stays(presidio):
    text = "Account DE89 3704 0044 0532 0130 00, card 4111 1111 1111 1111, phone +44 20 7946 0123."
    assert [(one.kind, one.text) for one in find(text)] == [
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("card", "4111 1111 1111 1111"),
        ("phone", "+44 20 7946 0123"),
    ]


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            PIECE,
            st.sampled_from(
                [
                    "ada@example.org",
                    " 07700 900123 ",
                    "4111 1111 1111 1111",
                    "192.0.2.1",
                    "NL91ABNA0417164300",
                    " ",
                    "\n",
                ]
            ),
        ),
        max_size=10,
    )
)
def test_any_text_comes_back(presidio, parts):
    text = "".join(parts)
    redacted = redact(text)
    assert redacted.restore(redacted.text) == text
    for one in redacted.entities:
        assert text[one.begin : one.end] == one.text


def test_no_network_is_asked(presidio, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("The network was asked.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    recogniser = privacy._email()
    assert recogniser.validate_result("ada@mail.example.org") and not recogniser.validate_result(
        "ada@reception"
    )


def test_without_presidio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(
        PrivacyError, match=r"not installed; `pip install --editable '\.\[hybrid\]'` in .* installs it\.$"
    ):
        privacy.analyzer.__wrapped__()


def test_import_is_light():
    code = (
        "import sys; from edgelab.deployments.hybrid import privacy, prompts; prompts.load('train');"
        "sys.exit(bool({'torch', 'spacy', 'presidio_analyzer', 'scipy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Policies and leakage


def test_leakage_by_hand():
    text = "From ada@example.org at 192.0.2.1."
    labelled = [[entity(text, "ada@example.org"), entity(text, "192.0.2.1", "ip")]] * 2
    assert leakage([text, None], labelled) == 0.5
    assert leakage(["from ADA@example.org", ""], labelled) == 0.25
    assert leakage([replaced(text, labelled[0]).text] * 2, labelled) == 0
    assert leakage([text], [[]]) is None
    with pytest.raises(
        PrivacyError, match=r"^1 texts were sent for 2 labelled prompts; give one for each\.$"
    ):
        leakage([text], labelled)


def test_policies(presidio):
    text = "Write to ada@example.org."
    assert outgoing(text, "local") is None
    assert outgoing(text, "redact").text == "Write to [EMAIL_1]."
    assert outgoing(text, "cloud") == Redacted(text)
    for policy in ("local", "redact", "cloud"):
        assert outgoing("Write soon.", policy) == Redacted("Write soon.")
    with pytest.raises(PrivacyError, match=r"^There is no policy 'hope'; there are local, redact, cloud\.$"):
        outgoing(text, "hope")


def test_what_leaks_under_each_policy(presidio, held_out):
    labelled = [item.entities for item in held_out]
    share = {}
    for policy in ("local", "redact", "cloud"):
        sent = [outgoing(item.text, policy) for item in held_out]
        share[policy] = leakage([one and one.text for one in sent], labelled)
    assert share["cloud"] == 1
    assert share["local"] <= share["redact"] <= 0.05


def test_an_entity_is_answered_by_its_placeholder(held_out):
    for item in held_out:
        redacted = replaced(item.text, item.entities)
        assert redacted.restore(redacted.text) == item.text
        if item.asks == "entity":
            of = [one.text for one in redacted.entities].index(item.answer)
            assert is_right(redacted.restore(f"It is {redacted.placeholders[of].lower()}."), item)
            assert not is_right(f"It is {redacted.placeholders[of]}.", item)
