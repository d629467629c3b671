"""Jobs on a cluster that is reached by its Jobs API: submitting, following, asking after, stopping, going on."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from raylab.base.mistakes import JobError
from raylab.job.jobs import dump_yaml
from raylab.job.specs import Job
from raylab.store.storage import is_url

# How long Ray waits for a driver that it asked to stop, so that running trials can record their rung. Ray reads it in
# the process that starts the driver, which has the environment of the submission.
STOP_SECONDS = 900
CONNECT_SECONDS = 10
LIVE = ("pending", "running")

# The cluster's own Python: its folder need not be on the PATH of the driver's shell, and none of the variables that Ray
# passes on names it. The shell's parent is Ray's supervisor, whose parent is the raylet, which was told the command
# that starts workers.
FIND_PYTHON = (
    "python=$(tr '\\0' '\\n' </proc/$(sed -n 's/^PPid:.//p' /proc/$PPID/status)/cmdline"
    " | sed -n 's/^--python_worker_command=\\([^ ]*\\) .*/\\1/p'); "
)
RAYLAB = '"${python:-python3}" -P -m raylab.cli'
ANSWER = "raylab-answer"


class Submission(NamedTuple):
    """A raylab job on the cluster: Ray's id of it, its results folder there, and Ray's state in lower case."""

    name: str
    submission_id: str
    results: str
    state: str
    message: str


class Cluster(NamedTuple):
    """A cluster's address and Ray's client of it."""

    address: str
    client: Any


@contextlib.contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster at a URL; whatever it refuses inside the block becomes a JobError of one line."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise JobError([f"--address {address}: must be the URL of the cluster's dashboard, such as http://HOST:8265"])
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray would put a RAY_ADDRESS of the environment before the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # Ray reads the environment when it is imported.
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    nobody = f"--address {address}: no Ray cluster answers; start it or correct the URL (http://HOST:8265)"
    try:
        requests.get(f"{address.rstrip('/')}/api/version", timeout=CONNECT_SECONDS)  # Ray's client has no time limit
        client = JobSubmissionClient(address)
        _check_version(address, client)
    except AuthenticationError as error:
        raise JobError([_explain_token(address, str(error))]) from None
    except (ConnectionError, requests.RequestException, RuntimeError, ValueError, KeyError) as error:
        raise error if isinstance(error, JobError) else JobError([nobody]) from None
    try:
        yield Cluster(address, client)
    except AuthenticationError as error:
        raise JobError([_explain_token(address, str(error))]) from None
    except (ConnectionError, requests.RequestException):
        raise JobError([f"--address {address}: the cluster no longer answers; what runs there may go on"]) from None
    except RuntimeError as error:
        if not str(error).startswith("Request failed"):
            raise
        raise JobError([f"--address {address}: the cluster refused: {str(error).splitlines()[0]}"]) from None


def _check_version(address: str, client: Any) -> None:
    import ray

    # Ray's client offers the version of its API only.
    theirs = client._do_request("GET", "/api/version").json()["ray_version"]
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise JobError(
            [f"--address {address}: the cluster runs Ray {theirs}, this machine {ray.__version__}; install the same"]
        )


def _explain_token(address: str, told: str) -> str:
    where = f"--address {address}"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if told.startswith("Authentication failed"):
        return f"{where}: the cluster refuses this token; correct RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH"
    if path and not os.environ.get("RAY_AUTH_TOKEN") and not (Path(path).is_file() and Path(path).stat().st_size):
        return f"RAY_AUTH_TOKEN_PATH: no token in {path}; name the file that holds the cluster's"
    return f"{where}: the cluster asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"


def check_folder(option: str, path: str) -> str:
    """A folder as the cluster sees it, or a URL. Raises JobError where it would depend on where something runs."""
    if option == "--results" and is_url(path):
        return path
    if not path.startswith("/"):
        raise JobError([f"{option} {path}: must be an absolute path, as every node of the cluster sees it"])
    return path


def submit_job(cluster: Cluster, job: Job, results: str) -> str:
    """Starts a job on the cluster and returns Ray's id of it. Raises JobError where one of its name runs there."""
    _refuse_running(cluster, job.name)
    with tempfile.TemporaryDirectory(prefix="raylab-submit-") as folder:
        (Path(folder) / "job.yaml").write_text(dump_yaml(job))
        arguments = ["run", "job.yaml", "--results", results, "--address", "auto"]
        return start_driver(cluster, job.name, results, arguments, folder)


def resume_job(cluster: Cluster, name: str, results: str | None, changes: list[str]) -> str:
    """Goes on with a job from the file kept beside its results, with options of `resume`; Ray's id of it."""
    _refuse_running(cluster, name)
    folder = results or find_submission(cluster, name).results
    return start_driver(cluster, name, folder, ["resume", name, "--results", folder, "--address", "auto", *changes])


def _refuse_running(cluster: Cluster, name: str) -> None:
    known = list_submissions(cluster).get(name)
    if known is not None and known.state in LIVE:
        raise JobError(
            [
                f"job {name} is {known.state} there as {known.submission_id}; "
                f"stop it first (raylab stop {name} --address {cluster.address}) or choose another name"
            ]
        )


def start_driver(cluster: Cluster, name: str, results: str, arguments: list[str], folder: str | None = None) -> str:
    """Starts a raylab command as the driver of a job, in a copy of `folder`, and returns Ray's id of it."""
    submission_id: str = cluster.client.submit_job(
        # exec: the signal to stop reaches the driver, not a shell before it.
        entrypoint=f"{FIND_PYTHON}exec {RAYLAB} {shlex.join(arguments)}",
        submission_id=f"raylab-{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        metadata={"raylab_job": name, "raylab_results": results},
        runtime_env={
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            **({"working_dir": folder} if folder else {}),
        },
    )
    return submission_id


def list_submissions(cluster: Cluster) -> dict[str, Submission]:
    """The newest submission of each raylab job by its name."""
    found: dict[str, Submission] = {}
    for details in sorted(cluster.client.list_jobs(), key=lambda details: details.start_time or 0):
        metadata = details.metadata or {}
        if details.submission_id and {"raylab_job", "raylab_results"} <= metadata.keys():
            name = metadata["raylab_job"]
            found[name] = Submission(
                name, details.submission_id, metadata["raylab_results"], details.status.lower(), details.message or ""
            )
    return found


def find_submission(cluster: Cluster, name: str) -> Submission:
    """The newest submission of a job. Raises JobError naming the jobs there are."""
    known = list_submissions(cluster)
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise JobError([f"no job '{name}' was submitted to {cluster.address}; jobs there: {listed}"])
    return known[name]


def print_logs(cluster: Cluster, name: str, follow: bool) -> None:
    """What a job's driver has printed, on stdout; with `follow`, until it ends."""
    submission = find_submission(cluster, name)
    if follow:
        follow_logs(cluster, submission.submission_id)
    else:
        print(cluster.client.get_job_logs(submission.submission_id), end="")
    _tell_start(find_submission(cluster, name))


def _tell_start(submission: Submission) -> None:
    """Why a job whose driver never started has no log."""
    if submission.state == "failed" and "entrypoint command failed" not in submission.message:
        lines = submission.message.strip().splitlines() or ["Ray says no more"]
        raise JobError([f"job {submission.name}: Ray could not start it: {lines[-1]}"])


def follow_logs(cluster: Cluster, submission_id: str) -> None:
    """Prints a job's log on stdout as it grows, until the job ends."""
    import aiohttp

    async def follow() -> None:
        async for lines in cluster.client.tail_job_logs(submission_id):
            print(lines, end="", flush=True)

    try:
        asyncio.run(follow())
    except (aiohttp.ClientError, RuntimeError) as error:
        raise ConnectionError(str(error)) from None


def wait_for(cluster: Cluster, submission_id: str) -> str:
    """Prints a job's log until it ends; Ray's last state of it."""
    follow_logs(cluster, submission_id)
    state = _wait_end(cluster, submission_id)
    for submission in list_submissions(cluster).values():
        if submission.submission_id == submission_id:
            _tell_start(submission)
    return state


def _wait_end(cluster: Cluster, submission_id: str) -> str:
    while True:
        state = str(cluster.client.get_job_status(submission_id)).lower()
        if state not in LIVE:
            return state
        time.sleep(0.1)


def _ask(cluster: Cluster, commands: list[str]) -> str:
    """What raylab commands print on the cluster, where the results are: a Ray Job of seconds, deleted after.

    Raises JobError with what raylab said where the last one fails.
    """
    client = cluster.client
    lines = "; ".join(f"{RAYLAB} {command}" for command in commands)
    submission_id = client.submit_job(entrypoint=f"{FIND_PYTHON}echo; echo {ANSWER}; {lines}")
    state = _wait_end(cluster, submission_id)
    # Ray's own line of the command may stand anywhere: it is written beside what the command prints.
    printed = re.sub(r"Running entrypoint for job [^\n]*\n", "", client.get_job_logs(submission_id))
    _, _, answer = printed.partition(f"\n{ANSWER}\n")
    message = client.get_job_info(submission_id).message or ""
    client.delete_job(submission_id)
    if state != "succeeded":
        told = [line.removeprefix("raylab: ") for line in answer.splitlines() if line.startswith("raylab: ")]
        last = " ".join(message.strip().splitlines()[-1:])
        raise JobError(told or [f"--address {cluster.address}: raylab does not work there: {last}"])
    return str(answer)


def summarise_cluster(cluster: Cluster, name: str | None, results: str | None) -> list[dict[str, Any]]:
    """A row a submitted job: Ray's state of it and its id, then what `raylab status` says on the cluster."""
    known = list_submissions(cluster) if name is None else {name: find_submission(cluster, name)}
    folders = sorted({results or submission.results for submission in known.values()})
    counted: dict[tuple[str, str], dict[str, Any]] = {}
    if folders:
        # A job that is just starting has no folder yet: no rows.
        commands = [
            f"status --results {shlex.quote(folder)} --format json 2>/dev/null || echo '[]'" for folder in folders
        ]
        answer = _ask(cluster, commands)
        decoder, at = json.JSONDecoder(), 0
        for folder in folders:
            rows, at = decoder.raw_decode(answer, answer.index("[", at))
            counted |= {(folder, row.pop("job")): row for row in rows}
    columns = {key: None for row in counted.values() for key in row}
    return [
        {
            "job": submission.name,
            "ray_job": submission.state,
            "submission_id": submission.submission_id,
            **columns,
            **counted.get((results or submission.results, submission.name), {}),
        }
        for submission in known.values()
    ]


def stop_job(cluster: Cluster, name: str, results: str | None, now: bool) -> str:
    """Asks a job's driver there to stop, and returns what raylab said. Raises JobError where none runs."""
    submission = find_submission(cluster, name)
    if submission.state not in LIVE:
        raise JobError([f"job {name} is not running there ({submission.state}); nothing to stop"])
    if submission.state == "pending":
        cluster.client.stop_job(submission.submission_id)
        return f"{name}: stopped before it started"
    folder = results or submission.results
    return _ask(cluster, [shlex.join(["stop", name, "--results", folder, *(["--now"] if now else [])])]).strip()
