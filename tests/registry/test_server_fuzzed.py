"""Requests drawn from the API's own description: whatever is asked, the answer is one that is described, and no 500."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks

from registry.server import create_app
from tests.registry.exhibit import opened

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    registry = opened(tmp_path_factory.mktemp("exhibit"))
    yield schemathesis.openapi.from_asgi("/api/openapi.json", create_app(registry, "secret"))
    registry.close()


def test_every_answer_is_one_that_is_described(described: BaseSchema) -> None:
    asked = 0
    for operation in described.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            case.headers = {**(case.headers or {}), "Authorization": "Bearer secret"}
            case.call_and_validate(checks=CHECKS)

        ask()
        asked += 1
    assert asked == 25
