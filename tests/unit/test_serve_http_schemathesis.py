"""Schemathesis makes requests out of our own OpenAPI document and holds the answers against it.

It knows nothing of this server but the document, so it finds both statuses that are not documented and bugs that no
test of ours thought of. In process: no port is opened.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from serve.http.app import build_app
from serve.http.settings import ServerSettings
from tests.parrot_engine import ParrotEngine

schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the OpenAPI document: make test-ray")
from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

pytestmark = pytest.mark.peer

KEY = "root"
# Answers to chats with tools need a template that has them; short ones are enough.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
APP = build_app(
    # It would find the parrot's keywords, because Hypothesis reads the constants of our modules.
    ParrotEngine(context_length=100, chat_template=TEMPLATE, says="<tool_call>", keywords=False),
    # The application starts and stops with every request here.
    ServerSettings(api_keys=(KEY,), admin_key=KEY, stop_engine=False),
)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"Authorization": f"Bearer {KEY}"})
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.allow_header_conformance,
    openapi_checks.negative_data_rejection,
]


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_what_the_document_says(case: schemathesis.Case) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS)


@SCHEMA.include(path_regex="^/(v1/|tokenize|admin/weights)").parametrize()
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_without_a_key_nothing_is_looked_at(case: schemathesis.Case) -> None:
    answer = case.call()
    case.validate_response(answer, checks=CHECKS[:-1])
    assert answer.status_code == 401
