"""The models here are tiny, as those of the engine's tests are."""

from tests.engine.conftest import one_thread as one_thread
