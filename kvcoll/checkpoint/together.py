"""Steps that all ranks take together, each of which may fail on one of them.

Rules of the file: a step is taken by all ranks, which have agreed on the call that it is of;
what goes wrong in it on any rank is raised on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, final

from ..agreement import Agreement, Call, Report, verdict
from ..errors import name_of, text_of
from ..schema import digest

_FAILED = 1  # flags of an agreement
_NOT = 2
_STEP = Call("a step of save() or load()", digest("step of a checkpoint"), is_of_files=True)

_Result = TypeVar("_Result")


@final
class Together:
    """Steps that all ranks take, each of which may fail on one of them.

    Unlike an agreement's refusal a failure ends no store, also where pushes are late.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement

    def run(self, step: Callable[[], str]) -> list[str]:
        """Give what the step gave on each rank."""
        return self._agreement.tell(self.do(step))

    def do(self, step: Callable[[], _Result]) -> _Result:
        """Give what the step gave on this rank, once it has failed on none."""
        try:
            result = step()
        except Exception as error:  # whatever it is: the others must not wait for this rank
            raise self.error_of(error) or error from error
        told = self.error_of(None)
        if told is not None:
            raise told
        return result

    def all_true(self, own: bool) -> bool:
        """Say whether this is so on all ranks."""
        return not self._agreement.confirm(_STEP, 0 if own else _NOT) & _NOT

    def error_of(self, failure: Exception | None) -> Exception | None:
        """Give the one error of all ranks, if any has failed."""
        if not self._agreement.confirm(_STEP, _FAILED if failure else 0) & _FAILED:
            return None
        said = Report("")
        if failure is not None:
            said = Report("", (), name_of(failure), text_of(failure))
        texts = self._agreement.tell(said.encode().decode())
        return verdict([Report.decode(text.encode()) for text in texts])
