"""``quire ab``: a report that can be pasted, arms that are equal, and one line for what is wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from quire.core.env import child_environment
from quire.server.cli.main import main

TRACE = ["--trace", "synthetic:requests=120,input=lognormal/800/1,output=exponential/40"]

RAISES = """
from quire.sdk import BatchingPolicy
class Raises(BatchingPolicy):
    "Fails at the first request."
    def admission_key(self, request):
        return request.no_such_field
"""


@pytest.fixture
def quire(capsys):
    def call(*words):
        status = main(["ab", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_paired_simulation_gives_a_report_with_plots(quire, tmp_path):
    words = ("--a", "fcfs", "--b", "sjf,aging=0", *TRACE, "--load", "0.9", "--pairs", "12", "--slo-ttft-ms", "500")
    status, out, _ = quire(*words, "--out", str(tmp_path / "report"))
    assert status == 0 and out.startswith(
        "# A/B: `fcfs` against `sjf,aging=0`\n\n**B is better in time to first token (p50"
    )
    table = "| metric | A | B | effect of B | 95 % interval | p | visible | for 5% |"
    other = (
        "| objectives kept |",
        "12 pairs",
        "equal but for the policy",
        "`quire ab --a fcfs --b sjf,aging=0 --pairs 12",
    )
    for text in (table, *other, "--load 0.9 --slo-ttft-ms 500.0 --out", "queues do not settle"):
        assert text in out, text
    assert "do not trust these latencies" not in out
    assert (tmp_path / "report" / "report.md").read_text().strip() == out.strip()
    for plot in ("latencies.png", "effects.png", "queue.png"):
        assert f"]({plot})" in out
        assert (tmp_path / "report" / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("design", [[], ["--design", "switchback", "--block", "1", "--washout", "0.1"]])
def test_a_load_near_capacity_is_named(quire, design):
    words = ("--a", "fcfs", "--b", "sjf", "--trace", "synthetic:requests=2200,input=fixed/600,output=fixed/40")
    status, out, err = quire(*words, "--load", "1.1", "--pairs", "12", *design)
    assert status == 0 and "- Note: load: 1.1" in out and "do not trust these latencies" in out, err


@pytest.mark.parametrize("design", [[], ["--design", "switchback", "--block", "1", "--washout", "0.1"]])
def test_a_policy_that_is_quarantined_gets_no_verdict(quire, design, tmp_path, monkeypatch):
    (tmp_path / "policy_that_raises.py").write_text(RAISES)
    monkeypatch.syspath_prepend(tmp_path)
    load = ["--arrivals", "uniform:rate=4"] if design else ["--load", "0.5"]
    arms = ("--a", "fcfs", "--b", "policy_that_raises:Raises")
    status, out, err = quire(*arms, *TRACE, *load, "--pairs", "12", *design)
    assert status == 2 and not out
    assert "a policy was quarantined (policy_that_raises:Raises: raised), and the one that took over" in err
    assert "Traceback" not in err and err.count("is quarantined") == 1


def test_the_same_arguments_give_the_same_verdict(quire):
    words = ("--a", "fcfs", "--b", "sjf,aging=0", *TRACE, "--load", "0.8", "--pairs", "12", "--json")
    first, second, other = quire(*words)[1], quire(*words)[1], quire(*words, "--seed", "90")[1]
    assert first == second != other
    assert json.loads(first)["effects"]["ttft_p50"].keys() >= {"low", "high", "corrected_p", "recommended_pairs"}


@pytest.mark.parametrize(
    ("arms", "remedy"),
    [(["--aa"], "whatever the seed. `--design switchback` has"), (["--b", "priority"], "play it at a higher `--load`")],
)
def test_a_paired_simulation_of_equal_plans_says_that_nothing_was_compared(quire, arms, remedy):
    words = ("--a", "fcfs", *arms, *TRACE, "--load", "0.5", "--pairs", "12")
    _, out, _ = quire(*words)
    assert "**Both arms made the same plans, so that nothing was compared.** All " in out and remedy in out
    assert "runs of this length find" not in out and "noise floor" not in out
    assert re.search(r"^\| time to first token, p50 .* \| \+0\.0% to \+0\.0% \| 1\.000 \| - \| - \|$", out, re.M)
    told = json.loads(quire(*words, "--json")[1])
    assert told["identical"] and told["verdict"].startswith("Both arms made the same plans")
    for effect in told["effects"].values():
        assert effect["smallest_effect"] is None and effect["recommended_pairs"] == 0 and not effect["better"]


def test_a_figure_that_no_request_has_is_not_said_to_be_equal(quire):
    words = ("--a", "fcfs", "--b", "sjf", "--trace", "synthetic:requests=80,output=fixed/1", "--load", "0.7")
    _, out, _ = quire(*words, "--pairs", "12", "--primary", "tpot_p50")
    assert "Time per output token, p50 was not measured in both arms" in out and "nan" not in out


def test_equal_arms_of_a_switchback_are_compared(quire):
    traffic = ["--trace", "synthetic:requests=1300,input=fixed/200,output=fixed/20", "--arrivals", "poisson:rate=10"]
    design = ["--design", "switchback", "--pairs", "12", "--block", "5", "--washout", "0.5"]
    _, out, _ = quire("--a", "fcfs", "--aa", *traffic, *design)
    assert "**No difference was found.** Time to first token, p50 does not differ" in out and "the noise floor" in out


def test_a_switchback_is_simulated_in_virtual_time(quire):
    traffic = ["--trace", "synthetic:requests=1300,input=fixed/200,output=fixed/20", "--arrivals", "poisson:rate=10"]
    design = ["--design", "switchback", "--pairs", "12", "--block", "5", "--washout", "0.5"]
    status, out, _ = quire("--a", "fcfs", "--b", "sjf", *traffic, *design)
    assert status == 0 and "Switchback: one server changed its policy" in out and "12 pairs" in out


def test_a_synchronous_arm_is_refused_and_where_allowed_flagged(quire):
    """vLLM RFC 42185: +7.4 % became +0.2 % when both arms were asynchronous."""
    words = ("--a", "fcfs", "--aa", "--a-set", "max_in_flight_steps=1", *TRACE, "--load", "0.5", "--pairs", "12")
    status, _, err = quire(*words)
    assert status == 2 and "differ in max_in_flight_steps: 1 in A, 2 in B; one arm waits for each step" in err
    status, out, _ = quire(*words, "--allow-unequal")
    assert status == 0 and "> **Unequal arms**: the arms differ in max_in_flight_steps" in out
    assert "B is better in" in out  # what the trap looks like: the same policy, and a difference


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ("max_num_batched_tokens=4096", "token budget"),
        ("num_blocks=9000", "the KV cache decides"),
        ("max_num_seqs=64", "queueing"),
        ("chunked_prefill=false", "chunked_prefill"),
    ],
)
def test_arms_of_other_budgets_are_refused(quire, changed, why):
    status, _, err = quire("--a", "fcfs", "--b", "sjf", "--b-set", changed, *TRACE, "--load", "0.5")
    assert status == 2 and why in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--a", "fcfs"], "name the arms"),
        (["--a", "fcfs", "--b", "sjf", "--aa", *TRACE], "leave out --b"),
        (["--a", "fcfs", "--b", "sjf"], "--trace is missing"),
        (["--a", "fcfs", "--b", "sfj", *TRACE, "--load", "1"], "did you mean sjf"),
        (["--a", "fcfs", "--b", "sjf,age=1", *TRACE, "--load", "1"], "no option 'age'"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--load", "1", "--pairs", "4"], "a verdict needs 12"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--load", "1", "--primary", "p50", "--pairs", "12"], "choose from ttft"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--load", "1", "--a-set", "num_block=3"], "choose max_num_seqs"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--load", "1", "--a-set", "num_blocks=many"], "num_blocks=many"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--design", "split"], "feel the other's policy"),
        (["--a", "gumbel", "--aa", "--kind", "sampler", *TRACE], "--design split"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--design", "replay"], "two: --url URL_A URL_B, got 0"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--design", "switchback", "--block", "9"], "twice the --washout"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--load", "0.5", "--design", "switchback"], "fewer --pairs"),
        (["--a", "fcfs", "--b", "sjf", *TRACE, "--arrivals", "poisson:rate=9", "--design", "replay", "--url",
          "http://127.0.0.1:9", "http://127.0.0.1:9"], "cannot be asked what it serves"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(quire, words, says):
    status, _, err = quire(*words)
    assert status == 2 and says in err and err.count("\n") == 1, err


LIVE = ["--trace", "synthetic:requests=96,input=fixed/12,output=fixed/3", "--arrivals", "uniform:rate=12",
        "--pairs", "12", "--block", "0.3", "--washout", "0.05", "--vocab-size", "200"]  # fmt: skip


def test_two_servers_are_compared_on_the_same_traffic(quire, server):
    status, out, err = quire("--a", "fcfs", "--aa", "--design", "replay", "--url", server.url, server.url, *LIVE)
    assert status == 0, err
    assert "Paired replay: each stretch of traffic was sent to both servers at once." in out and "12 pairs" in out


def test_a_server_that_wants_a_key_says_so(quire, start):
    running = start("--api-key", "k")
    words = ("--a", "fcfs", "--b", "sjf", "--design", "switchback", "--url", running.url, *LIVE)
    for key in ((), ("--api-key", "another")):
        status, _, err = quire(*words, *key)
        assert (
            status == 2 and err == f"quire: error: {running.url}/v1/models answered 401; give its key with --api-key\n"
        )


def test_a_replay_asks_the_servers_for_their_policies(quire, start):
    running = start("--admin-api-key", "secret", "--scheduling-policy", "sjf", "--scheduling-policy-option", "aging=0")
    words = ("--design", "replay", "--url", running.url, running.url, *LIVE)
    status, out, err = quire("--a", "sjf,aging=0.0", "--aa", *words, "--admin-api-key", "secret")
    assert status == 0 and "was not asked" not in out, err
    status, out, _ = quire("--a", "sjf,aging=0", "--aa", *words)
    assert status == 0 and "whether the servers have these policies was not asked" in out
    for other in ("fcfs", "sjf", "sjf,aging=1"):
        status, _, err = quire("--a", "sjf,aging=0", "--b", other, *words, "--admin-api-key", "secret")
        assert status == 2 and err.count("\n") == 1
        assert f"--b is {other}, and {running.url} schedules by sjf (aging=0)" in err


@pytest.mark.parametrize("live", [False, True])
def test_traffic_with_pauses_as_long_as_stretches_is_refused_at_once(quire, server, live, tmp_path):
    trace, design = tmp_path / "azure.csv", ["--design", "replay", "--url", server.url, server.url] if live else []
    lines = [f"2023-11-16 18:17:{second:02}.0000000,12,3" for second in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    arrivals = ["--arrivals", "onoff:rate=10,on=1,off=20"]
    status, _, err = quire("--a", "fcfs", "--b", "sjf", "--trace", str(trace), *arrivals, "--pairs", "12", *design)
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"\b[1-9] of 12 stretches have requests after the first [0-9.]+ s, and a verdict needs", err), err


def test_samplers_may_be_compared_by_a_split_of_requests(quire, server):
    words = ("--kind", "sampler", "--a", "gumbel", "--aa", "--design", "split", "--url", server.url, server.url)
    status, out, err = quire(*words, *LIVE)
    assert status == 0, err
    assert "Split by request" in out


def test_a_server_says_what_it_is(server):
    from quire.server.ab.live import describe_server

    described = describe_server(server.url)
    assert described["model"] == "tiny" and described["num_blocks"] > 1 and described["block_size"] == 16
    assert described.get("asynchronous") in (True, False, None)


SWITCHBACK = ("--a", "sjf", "--b", "sjf,aging=0", "--design", "switchback", *LIVE)


def get_policy(running):
    with running.http as client:
        return client.get("/admin/policy", headers={"Authorization": "Bearer secret"}).json()


def test_a_servers_policy_changes_between_stretches_and_is_given_back(quire, start):
    running = start("--admin-api-key", "secret", "--scheduling-policy", "priority")
    words = (*SWITCHBACK, "--url", running.url)
    status, _, err = quire(*words)
    assert status == 2 and "/admin/policy answered 401: the admin API key" in err and err.count("\n") == 1
    status, out, err = quire(*words, "--admin-api-key", "secret")
    assert status == 0, err
    assert "Switchback: one server changed its policy" in out and "24 stretches of 0.3 s" in err
    policy = get_policy(running)
    assert policy["name"] == "priority" and policy["num_switches"] >= 25
    status, _, err = quire(*words, "--admin-api-key", "secret", "--block", "30")
    assert status == 2 and "24 blocks take 720 s" in err, "a trace that is too short is refused at once"


def test_a_test_that_is_interrupted_gives_the_policy_back(start):
    running = start("--admin-api-key", "secret")
    words = [sys.executable, "-m", "quire", "ab", *SWITCHBACK, "--url", running.url, "--admin-api-key", "secret"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=child_environment()) as process:
        while get_policy(running)["name"] != "sjf":
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        err = process.communicate()[1]
    assert process.returncode == 143
    assert "; the policy is fcfs (defaults), switched " in err.splitlines()[-2], err
    assert err.splitlines()[-1].startswith("quire: no report: 0 of 12 pairs of stretches were measured"), err
    assert get_policy(running)["name"] == "fcfs"


def test_an_interrupted_test_reports_what_it_measured(start, tmp_path):
    """On paper and as JSON: that it is partial, without a verdict, and how much longer a run would be needed."""
    running = start("--admin-api-key", "secret")
    words = [sys.executable, "-m", "quire", "ab", *SWITCHBACK, "--url", running.url, "--admin-api-key", "secret"]
    words += ["--arrivals", "uniform:rate=3", "--block", "1", "--json", "--out", str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    ) as process:
        while get_policy(running)["num_switches"] < 8:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err and get_policy(running)["name"] == "fcfs"
    told = json.loads(out)
    assert told["partial"] and 2 <= told["pairs"] < 12 and told["verdict"].startswith("No verdict: ")
    report = (tmp_path / "report.md").read_text()
    [rest] = re.findall(
        rf"^> \*\*Partial\*\*: interrupted; {told['pairs']} of 12 pairs were measured\. (.*)$", report, re.M
    )
    assert rest.startswith(f"A verdict needs 12: {(12 - told['pairs']) * 2 / 60:.1f} min more. "), rest
    assert f"**No verdict: {told['pairs']} pairs were measured, and 12 are the least.**\n" in report


def test_a_live_policy_that_is_quarantined_gets_no_verdict(quire, start, tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    running = start("--admin-api-key", "secret")
    words = ("--a", "fcfs", "--b", f"{tmp_path}/raises.py:Raises", *SWITCHBACK[4:], "--url", running.url)
    status, out, err = quire(*words, "--admin-api-key", "secret")
    assert status == 2 and not out and "was quarantined" in err.splitlines()[-1], err
    assert get_policy(running)["name"] == "fcfs"


def test_a_server_without_an_admin_key_is_told_of(quire, server):
    words = ("--a", "fcfs", "--b", "sjf", "--design", "switchback", "--url", server.url, *LIVE)
    status, _, err = quire(*words)
    assert status == 2 and "start it with --admin-api-key" in err
