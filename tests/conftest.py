"""Failures inside the shared suites are told as in any test."""

import pytest

pytest.register_assert_rewrite("generate.contract")
