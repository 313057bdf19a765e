"""What all long jobs stand on: the claim of a folder, the journal, publication, and where everything lies in OUT."""

from __future__ import annotations

from rac_engine.base.linux import require_linux

require_linux()
