"""Webhooks: allowed addresses, signatures, and retries."""

import json
import time

import pytest
import standardwebhooks
from openai import InvalidWebhookSignatureError, OpenAI

from pipeline.core.errors import UserError
from pipeline.core.requests import EventState
from pipeline.webhooks import allowlist
from pipeline.webhooks.allowlist import is_allowed
from pipeline.webhooks.delivery import Verdict, judge, signatures

ALLOWED = ("https://etl.example.com/hooks/vectormill/", "http://10.0.0.5:8080", "nonsense", "https://[::1]:99/a")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFh"


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://etl.example.com/hooks/vectormill", True),
        ("https://etl.example.com/hooks/vectormill/nightly?token=a%20b", True),
        ("https://ETL.example.com:443/hooks/vectormill", True),
        ("http://10.0.0.5:8080", True),
        ("http://10.0.0.5:8080/anything", True),
        ("https://[::1]:99/a/b", True),
        # Another scheme, host, port or path.
        ("http://etl.example.com/hooks/vectormill", False),
        ("https://etl.example.com.evil.test/hooks/vectormill", False),
        ("https://evil.test/https://etl.example.com/hooks/vectormill", False),
        ("https://etl.example.com:444/hooks/vectormill", False),
        ("https://etl.example.com/hooks/vectormillions", False),
        ("https://etl.example.com/hooks", False),
        ("https://etl.example.com/Hooks/vectormill", False),
        ("http://10.0.0.5:80800", False),
        ("http://10.0.0.5", False),
        ("ftp://10.0.0.5:8080/x", False),
        ("nonsense", False),
        ("", False),
        # Addresses that some parsers read in another way.
        ("https://etl.example.com/hooks/vectormill/../../admin", False),
        ("https://etl.example.com/hooks/vectormill/./x", False),
        ("https://etl.example.com/hooks/vectormill/%2e%2e/admin", False),
        ("https://etl.example.com/hooks/vectormill/..%2Fadmin", False),
        ("https://etl.example.com/hooks/vectormill\\..\\admin", False),
        ("https://etl.example.com@evil.test/hooks/vectormill", False),
        ("https://me:secret@etl.example.com/hooks/vectormill", False),
        ("https://etl.example.com#@evil.test/hooks/vectormill", False),
        ("https://etl.example.com/hooks/vectormill#x", False),
        ("https://etl.example.com/hooks/vectormill\n", False),
        ("https://etl.example.com/hooks/vectormill x", False),
        ("https://etl.example.com:x/hooks/vectormill", False),
        ("https://[::1/hooks", False),
        ("https://etl.exámple.com/hooks/vectormill", False),
    ],
)
def test_which_addresses_are_allowed(url: str, allowed: bool) -> None:
    assert is_allowed(url, ALLOWED) is allowed
    assert not is_allowed(url, ())


def test_what_is_refused_is_named_without_its_path() -> None:
    with pytest.raises(UserError) as caught:
        allowlist.check("https://evil.test/token", ALLOWED)
    assert str(caught.value) == (
        "webhook: https://evil.test isn't below an address that the operator allows; VECTORMILL_WEBHOOKS lists them."
    )


def test_the_example_of_the_specification() -> None:
    """The example comes from the Standard Webhooks' own libraries."""
    event_id, timestamp, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, '{"test": 2432232314}'
    assert signatures(SECRET, event_id, timestamp, body) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("known", [SECRET, OTHER])
def test_receivers_verify_it_by_either_secret(known: str) -> None:
    now, body = int(time.time()), json.dumps({"id": "evt_1", "type": "batch.completed", "data": {"id": "batch_1"}})
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(now),
        "webhook-signature": signatures(f"{OTHER} {SECRET}", "evt_1", now, body),
    }
    assert standardwebhooks.Webhook(known).verify(body, headers) == json.loads(body)
    client = OpenAI(api_key="none", webhook_secret=known)
    assert client.webhooks.unwrap(body, headers).type == "batch.completed"
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body.replace("batch_1", "batch_2"), headers)


def test_when_it_is_tried_again() -> None:
    waits: list[float] = []
    while (verdict := judge(500, len(waits) + 1)).state is EventState.WAITING:
        waits.append(verdict.wait_seconds)
    assert verdict == Verdict(EventState.GIVEN_UP)
    assert waits[0] == 5
    assert waits == sorted(waits)
    assert 23 * 3_600 < sum(waits) < 25 * 3_600


@pytest.mark.parametrize(
    ("status", "tries", "wanted"),
    [
        (200, 1, Verdict(EventState.DELIVERED)),
        (204, 11, Verdict(EventState.DELIVERED)),
        (299, 1, Verdict(EventState.DELIVERED)),
        (410, 1, Verdict(EventState.GIVEN_UP)),
        (301, 1, Verdict(EventState.WAITING, 5)),
        (400, 2, Verdict(EventState.WAITING, 30)),
        (429, 1, Verdict(EventState.WAITING, 5)),
        (None, 3, Verdict(EventState.WAITING, 120)),
        (None, 11, Verdict(EventState.GIVEN_UP)),
        (503, 12, Verdict(EventState.GIVEN_UP)),
    ],
)
def test_what_an_answer_means(status: int | None, tries: int, wanted: Verdict) -> None:
    assert judge(status, tries) == wanted
