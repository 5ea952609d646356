"""How a headless run can fail. Each kind has an exit code of its own, so that scripts can tell them apart."""

from __future__ import annotations


class RunError(Exception):
    """A run that cannot start or did not finish; the text is one sentence for the user."""

    exit_code = 1


class ExecutionFailed(RunError):
    """A node raised while the prompt ran."""

    exit_code = 1


class WorkflowError(RunError):
    """The workflow, or a setting given for it, is not valid."""

    exit_code = 2


class ServerUnreachable(RunError):
    """No server answers, or it stopped answering."""

    exit_code = 3


class Cancelled(RunError):
    """The prompt was interrupted, here or by somebody else on the same server."""

    exit_code = 130
