"""Several conversations at one session: nothing is read twice, nothing is mixed up, and everything is let go of."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import Desk, create_app
from edgelab.deployments.hybrid.server.conversations import Verifying
from edgelab.deployments.hybrid.server.messages import VerifyRequest
from edgelab.deployments.hybrid.server.sequences import common
from edgelab.deployments.hybrid.server.service import Service
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.session import Can
from tests.server.requests import AUTHORIZED, LIMITS, PROMPT, TOKEN, complete, hidden, verify
from tests.server.sessions import first_part_of, greedy

PROMPTS = ([5, 100, 42, 7], [8, 9, 10, 11, 12, 13], [200, 3], [77, 5, 100, 42])  # none begins as another one
ROUNDS = 5
NAMES = [f"conversation{place}" for place in range(len(PROMPTS))]


class OneSequence(Eager):
    """An engine that holds one sequence."""

    can = Can(layers=True)


@pytest.fixture(scope="module")
def drafts(twin):
    """Drafts of each conversation in order; every other one has a wrong token in it."""
    found = []
    for prompt in PROMPTS:
        text = greedy(twin, prompt, 4 * ROUNDS)
        rounds, place = [], 0
        for step in range(ROUNDS):
            draft = text[place : place + 3]
            if step % 2:
                draft[1] = (draft[1] + 1) % 300
            rounds.append(draft)
            place += 2 if step % 2 else 4  # what stays, and the token behind it
        found.append(rounds)
    return found


class Counted:
    """Verifying over a session that notes how many tokens it reads."""

    def __init__(self, session, **limits):
        self.read = 0
        feed = session._feed

        def noted(ids, every):
            self.read += len(ids)
            return feed(ids, every)

        session._feed = noted
        self.verifying = Verifying(
            Service(session, None, "tiny"), replace(LIMITS, conversations=len(PROMPTS), **limits)
        )

    def step(self, place, step, draft):
        begin = {"prompt": list(PROMPTS[place])} if step == 0 else {}
        asked = VerifyRequest(conversation=NAMES[place], step=step, draft=draft, **begin)
        told = self.verifying.step(asked, b"")
        return told.accepted, told.next

    def in_order(self, drafts, order):
        """The answers of each conversation, which take their next steps in this order."""
        found = [[] for _ in drafts]
        for place in order:
            step = len(found[place])
            found[place].append(self.step(place, step, drafts[place][step]))
        return found


@pytest.fixture(scope="module")
def alone(new_model, drafts):
    """The answers of each conversation that has a server to itself, and the tokens read for all of them."""
    found, read = [], 0
    for place in range(len(PROMPTS)):
        counted = Counted(Eager(new_model("llama")))
        found.append(counted.in_order(drafts, [place] * ROUNDS)[place])
        read += counted.read
    return found, read


def test_each_token_is_read_once_however_conversations_take_turns(new_model, drafts, alone):
    texts, read = alone
    assert read == sum(len(prompt) - 1 for prompt in PROMPTS) + len(PROMPTS) * ROUNDS * 4
    assert {accepted for text in texts for accepted, _ in text} == {1, 3}
    counted = Counted(Eager(new_model("llama")))
    assert counted.in_order(drafts, [*range(len(PROMPTS))] * ROUNDS) == texts
    assert counted.read == read
    assert len(counted.verifying.sequences) == len(PROMPTS)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(
    order=st.permutations([*range(len(PROMPTS))] * ROUNDS),
    sequences=st.integers(1, len(PROMPTS)),
    sequence_bytes=st.sampled_from([1, 20_000, 10**9]),
)
def test_any_order_and_any_room_give_the_same_texts(
    order, sequences, sequence_bytes, new_model, drafts, alone
):
    counted = Counted(Eager(new_model("llama")), sequences=sequences, sequence_bytes=sequence_bytes)
    assert counted.in_order(drafts, order) == alone[0]
    assert len(counted.verifying.sequences) <= sequences
    assert counted.verifying.sequences.nbytes <= sequence_bytes


def test_what_had_to_make_room_is_read_again(new_model, drafts, alone):
    for room in ({"sequences": 2}, {"sequence_bytes": 1}):
        counted = Counted(Eager(new_model("llama")), **room)
        assert counted.in_order(drafts, [*range(len(PROMPTS))] * ROUNDS) == alone[0]
        assert counted.read > alone[1]
        assert len(counted.verifying.sequences) == room.get("sequences", 1)


def test_the_one_used_least_recently_makes_room(new_model, drafts):
    counted = Counted(Eager(new_model("llama")), sequences=2)
    for place in (0, 1):
        counted.step(place, 0, drafts[place][0])
    counted.step(0, 1, drafts[0][1])
    counted.step(2, 0, drafts[2][0])  # in the place of 1
    before = counted.read
    counted.step(0, 2, drafts[0][2])
    assert counted.read == before + 4
    counted.step(1, 1, drafts[1][1])
    assert counted.read == before + 4 + len(PROMPTS[1]) - 1 + 4 + 4  # prompt, first round, second round


def test_an_engine_that_holds_one_sequence_answers_the_same(new_model, drafts, alone):
    counted = Counted(OneSequence(new_model("llama")))
    assert counted.in_order(drafts, [*range(len(PROMPTS))] * ROUNDS) == alone[0]
    assert counted.read > alone[1]
    assert len(counted.verifying.sequences) == 0


def test_what_begins_as_another_conversation_goes_on_from_there(new_model, drafts, alone):
    """Also where the other one goes on, and where it has gone further than both have in common."""
    counted = Counted(Eager(new_model("llama")))
    first = [counted.step(0, step, drafts[0][step]) for step in range(3)]
    longer = [*PROMPTS[0], 17, 18, 19]
    before = counted.read
    asked = VerifyRequest(conversation="another-one", step=0, draft=[20, 21], prompt=longer)
    told = counted.verifying.step(asked, b"")
    assert counted.read == before + 2 + 3  # two of the prompt were new, and its last one comes with the draft
    apart = Verifying(Service(Eager(new_model("llama")), None, "tiny"), LIMITS)
    assert told == apart.step(asked, b"")
    first += [counted.step(0, step, drafts[0][step]) for step in range(3, ROUNDS)]
    assert first == alone[0][0]
    assert counted.read == before + 5 + 2 * 4


def test_what_was_read_in_part_is_read_again(new_model, drafts, alone):
    session = Eager(new_model("llama"))
    counted = Counted(session)
    first = [counted.step(0, 0, drafts[0][0])]
    feed = session._feed

    def broken(ids, every):
        feed(ids, every)
        raise MemoryError

    session._feed = broken
    with pytest.raises(MemoryError):
        counted.step(0, 1, drafts[0][1])
    session._feed = feed
    assert len(counted.verifying.sequences) == 0
    first += [counted.step(0, step, drafts[0][step]) for step in range(1, ROUNDS)]
    assert first == alone[0][0]


def test_answers_and_states_in_between_disturb_nobody(client, twin, first_part, drafts, alone):
    """Three ways of asking at one server, in turns."""
    states, written, found = first_part_of(first_part), greedy(twin, PROMPT, 16), [[], []]
    for step, place in itertools.product(range(ROUNDS), range(2)):
        begin = {"prompt": PROMPTS[place]} if step == 0 else {}
        told = verify(client, step, drafts[place][step], name=NAMES[place], **begin).json()
        found[place].append((told["accepted"], told["next"]))
        assert complete(client)["choices"][0]["token_ids"] == written
        name = f"states-{step}-{place}"
        assert hidden(client, 0, states, name=name).json()["next"] == written[0]
        assert client.delete(f"/conversations/{name}").status_code == 204
    assert found == alone[0][:2]


# Letting go


def held_bytes():
    """Of all tensors in this process."""
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if issubclass(type(one), torch.Tensor))


def test_after_two_hundred_requests_memory_is_back_where_it_was(client, first_part):
    states = first_part_of(first_part)

    def talk(number):
        """Five requests. Conversations of drafts make room by themselves."""
        for step, begin in enumerate(({"prompt": [2 + number, *PROMPT]}, {})):
            told = verify(client, step, [1, 2, 3], name=f"conversation{number}", **begin)
            assert told.status_code == 200
        assert hidden(client, 0, states, name=f"states-{number}").status_code == 200
        assert client.delete(f"/conversations/states-{number}").status_code == 204
        complete(client)

    def none_open(numbers):
        gone = [client.delete(f"/conversations/conversation{number}").status_code for number in numbers]
        complete(client)
        assert client.get("/health").json()["conversations"] == 0
        return gone.count(204), held_bytes()

    talk(0)
    _, before = none_open([0])
    for number in range(40):
        talk(number)
    assert held_bytes() > before
    assert none_open(range(40)) == (LIMITS.conversations, before)


def test_whoever_is_idle_is_forgotten_when_anybody_asks(service, drafts):
    desk, now = Desk(service, LIMITS), 0.0
    desk.verifying.open._clock = lambda: now
    for place in range(2):
        asked = VerifyRequest(conversation=NAMES[place], step=0, draft=[], prompt=list(PROMPTS[place]))
        desk.verifying.step(asked, b"")
    desk.begin()
    assert len(desk.verifying.sequences) == 2 and desk.verifying.sequences.nbytes > 0
    now = LIMITS.idle_s + 1
    desk.begin()
    assert len(desk.verifying.sequences) == 0 == desk.verifying.sequences.nbytes
    desk.close()


def test_a_server_that_ends_lets_go_of_everything(new_model, byte_tokenizer):
    before = held_bytes()
    service = Service(Eager(new_model("llama")), byte_tokenizer, "tiny")
    app = create_app(service, TOKEN, LIMITS)
    with TestClient(app, headers=AUTHORIZED) as client:
        for name, prompt in zip(NAMES, PROMPTS, strict=True):
            assert verify(client, 0, [1, 2], name=name, prompt=prompt).status_code == 200
    service.close()
    assert held_bytes() == before


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([], [], 0), ([1, 2], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 4, 3], 1), ([5], [6], 0)],
)
def test_common_beginnings_by_hand(one, other, count):
    assert common(one, other) == count == common(other, one)
