"""The gateway's files, compared whole; no Envoy needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.release.api_keys import read_api_keys
from tasks.release.envoy import CLUSTERS, ROUTES, render, union, version_of
from tasks.release.envoy_listener import CERTIFICATE, LATENCY_EDGES_MS, render_bootstrap, render_certificate
from tasks.release.model import Backend, GatewayState, Replay, Route
from tasks.release.stats import ServiceStats, percentile_ms, query, read_stats
from tasks.spec.errors import BadRequest
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(30)
TYPE = "type.googleapis.com/envoy"


def backend(service: str, weight: int = 100, *endpoints: str) -> Backend:
    return Backend(service=service, weight=weight, endpoints=endpoints or ("127.0.0.1:9000",))


def to(*backends: Backend, **more) -> Route:
    return Route(backends=backends, **more)


def hosts(text: str) -> dict:
    return json.loads(text)["resources"][0]["virtual_hosts"][0]


def retry(on: str, seconds: int) -> dict:
    kind = f"{TYPE}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    predicate = {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": kind}}
    return {
        "retry_on": on,
        "num_retries": 2,
        "per_try_timeout": f"{seconds}s",
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "retry_host_predicate": [predicate],
        "host_selection_retry_max_attempts": 3,
    }


OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"
SAFE = "connect-failure,refused-stream,reset-before-request"
NO_KEY = {
    "envoy.filters.http.api_key_auth": {"@type": f"{TYPE}.config.route.v3.FilterConfig", "disabled": True},
}
MATCH = {"path_separated_prefix": "/v2/models/digits"}
GET = MATCH | {"headers": [{"name": ":method", "string_match": {"exact": "GET"}}]}
TOKEN = "t" * 32


def action(retry_policy: dict, **clusters: int) -> dict:
    shares = [{"name": name.replace("_", "-"), "weight": weight} for name, weight in clusters.items()]
    return {"weighted_clusters": {"clusters": shares}, "timeout": "60s", "retry_policy": retry_policy}


def refused(status: int, message: str, prefix: str = "/", **match) -> dict:
    response = {"status": status, "body": {"inline_string": message}}
    return {"match": {"prefix": prefix} | match, "direct_response": response}


def around(*routes: dict, served: str) -> list[dict]:
    """What stands before and after the routes of the workloads."""
    json_type = {"header": {"key": "content-type", "value": "application/json"}, "append_action": OVERWRITE}
    live = {"status": 200, "body": {"inline_string": '{"live":true}'}}
    length = {"name": "content-length", "range_match": {"start": (64 << 20) + 1, "end": (1 << 63) - 1}}
    return [
        {
            "match": {"path": "/v2/health/live"},
            "direct_response": live,
            "response_headers_to_add": [json_type],
            "typed_per_filter_config": NO_KEY,
        },
        refused(413, "the body is over 67108864 bytes, the limit", headers=[length]),
        *routes,
        refused(404, f"no such workload; this gateway serves {served}", "/v2/models/"),
        refused(404, "no such path; ask /v2/health/live or /v2/models/WORKLOAD/infer"),
    ]


def test_routes_of_a_canary():
    shares = to(backend("digits-a", 95), backend("digits-b", 5))
    text = render(GatewayState(revision=7, routes={"digits": shares}))[ROUTES]
    routes = around(
        {"match": GET, "route": action(retry(f"{SAFE},reset,gateway-error", 5), digits_a=95, digits_b=5)},
        {"match": MATCH, "route": action(retry(SAFE, 30), digits_a=95, digits_b=5)},
        served="digits",
    )
    host = {"name": "all", "domains": ["*"], "routes": routes, "request_headers_to_remove": ["x-drydock-replay"]}
    resource = {
        "@type": f"{TYPE}.config.route.v3.RouteConfiguration",
        "name": "workloads",
        "virtual_hosts": [host],
        "response_headers_to_remove": ["server"],
    }
    assert json.loads(text) == {"version_info": version_of(text), "resources": [resource]}
    assert version_of(text).startswith("7-")


def test_routes_of_a_first_version_that_only_the_replay_reaches():
    route = Route(replay=Replay(token=TOKEN, backends=(backend("digits-a"),)))
    door = MATCH | {"headers": [{"name": "x-drydock-replay", "string_match": {"exact": TOKEN}}]}
    mark = {"header": {"key": "x-drydock-replayed", "value": "true"}, "append_action": OVERWRITE}
    replayed = {
        "match": door,
        "route": {"cluster": "digits-a", "timeout": "60s", "retry_policy": retry(SAFE, 30)},
        "request_headers_to_add": [mark],
        "typed_per_filter_config": NO_KEY,
    }
    state = GatewayState(routes={"digits": route}, limits={"digits": 5})
    assert hosts(render(state)[ROUTES])["routes"] == around(replayed, served="none")


def test_a_shadow_and_a_limit_are_for_the_public_only():
    replay = Replay(token=TOKEN, backends=(backend("digits-b"),))
    route = to(backend("digits-a"), shadow=backend("digits-b", 20), replay=replay)
    _, _, door, get, post, *_ = hosts(render(GatewayState(routes={"digits": route}, limits={"digits": 5}))[ROUTES])[
        "routes"
    ]
    share = {"default_value": {"numerator": 20, "denominator": "HUNDRED"}}
    mirror = {"cluster": "digits-b", "runtime_fraction": share, "disable_shadow_host_suffix_append": True}
    for public in (get, post):
        assert public["route"]["request_mirror_policies"] == [mirror]
        (limit,) = public["typed_per_filter_config"].values()
        bucket = {"max_tokens": 5, "tokens_per_fill": 5, "fill_interval": "1s"}
        assert limit["descriptors"] == [{"entries": [{"key": "masked_remote_address"}], "token_bucket": bucket}]
    assert "request_mirror_policies" not in door["route"]
    assert list(door["typed_per_filter_config"]) == ["envoy.filters.http.api_key_auth"]


def test_keys_are_asked_for_on_the_whole_host_but_for_health_and_replay():
    replay = Replay(token=TOKEN, backends=(backend("digits-b"),))
    state = GatewayState(routes={"digits": to(backend("digits-a"), replay=replay)}, limits={"digits": 5})
    host = hosts(render(state, {"bob": "b" * 16, "ann": "a" * 16})[ROUTES])
    (keyed,) = host["typed_per_filter_config"].values()
    assert keyed["credentials"] == [{"key": "a" * 16, "client": "ann"}, {"key": "b" * 16, "client": "bob"}]
    assert keyed["forwarding"] == {"header": "x-drydock-client", "hide_credentials": True}
    open_to_all = [r["match"] for r in host["routes"] if r.get("typed_per_filter_config") == NO_KEY]
    assert [match.get("path") or match["headers"][0]["name"] for match in open_to_all] == [
        "/v2/health/live",
        "x-drydock-replay",
    ]
    (limit,) = host["routes"][-3]["typed_per_filter_config"].values()
    assert limit["descriptors"][0]["entries"] == [{"key": "client"}]
    # No key is in force: asked for all the same, and none is right.
    assert hosts(render(state, {})[ROUTES])["typed_per_filter_config"]
    assert "typed_per_filter_config" not in hosts(render(state)[ROUTES])


def test_cluster_of_a_service():
    state = GatewayState(routes={"digits": to(backend("digits-a", 100, "127.0.0.1:9001", "[::1]:9002"))})
    text = render(state)[CLUSTERS]
    options = f"{TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions"
    addresses = [("127.0.0.1", 9001), ("::1", 9002)]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in addresses
    ]
    cluster = {
        "@type": f"{TYPE}.config.cluster.v3.Cluster",
        "name": "digits-a",
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": "digits-a", "endpoints": [{"lb_endpoints": endpoints}]},
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 1024,
                    "max_pending_requests": 1024,
                    "max_requests": 1024,
                    "max_retries": 16,
                }
            ]
        },
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 3,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_percent": 50,
        },
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 30}},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": "4s"},
            }
        },
    }
    assert json.loads(text) == {"version_info": version_of(text), "resources": [cluster]}


def test_a_name_is_resolved_and_an_address_is_not():
    state = GatewayState(routes={"a": to(backend("a-x", 100, "replica-1:80")), "b": to(backend("b-x"))})
    types = {c["name"]: c["type"] for c in json.loads(render(state)[CLUSTERS])["resources"]}
    assert types == {"a-x": "STRICT_DNS", "b-x": "STATIC"}


def test_union_keeps_what_the_routes_on_disk_may_name():
    old = render(GatewayState(revision=1, routes={"a": to(backend("a-old"))}))[CLUSTERS]
    new = render(GatewayState(revision=2, routes={"a": to(backend("a-new"))}))[CLUSTERS]
    both = union(new, old)
    assert {c["name"] for c in json.loads(both)["resources"]} == {"a-old", "a-new"}
    assert version_of(both).startswith("2-")
    assert version_of(both) != version_of(new)
    assert union(new, None) == new == union(new, new)


def test_bootstrap_reads_the_files_that_are_rendered():
    settings = resolve({}, home="/h", host="0.0.0.0", gateway_port=1, gateway_admin_port=2)
    data = json.loads(render_bootstrap(settings, Path("/h/gateway")))
    admin = data["admin"]["address"]["socket_address"]
    assert admin == {"address": "127.0.0.1", "port_value": 2}
    listener = data["static_resources"]["listeners"][0]
    assert listener["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 1}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    for source, name in (
        (data["dynamic_resources"]["cds_config"], CLUSTERS),
        (manager["rds"]["config_source"], ROUTES),
    ):
        path = Path("/h/gateway") / name
        watched = {"path": str(path.parent)}
        assert source["path_config_source"] == {"path": str(path), "watched_directory": watched}


def test_another_container_may_ask_the_harmless_part_of_the_admin_page_alone():
    assert len(json.loads(render_bootstrap(resolve({}), Path("/h/gateway")))["static_resources"]["listeners"]) == 1
    settings = resolve({"DRYDOCK_GATEWAY_ADMIN_AT": "http://gateway:9902"})
    static = json.loads(render_bootstrap(settings, Path("/h/gateway")))["static_resources"]
    door = static["listeners"][1]
    assert door["address"]["socket_address"]["port_value"] == 9902
    routes = door["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
    opened = {route["match"]["path"] for route in routes}
    assert opened == {"/ready", "/stats", "/stats/prometheus", "/reopen_logs"}
    assert all(route["route"] == {"cluster": static["clusters"][0]["name"]} for route in routes)


names = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)


@given(st.sets(names, max_size=5), st.integers(0, 9))
def test_every_route_names_a_cluster_and_the_text_is_stable(workloads, revision):
    routes = {
        name: to(
            backend(f"{name}-x"),
            shadow=backend(f"{name}-y"),
            replay=Replay(token=TOKEN, backends=(backend(f"{name}-z"),)),
        )
        for name in workloads
    }
    state = GatewayState(revision=revision, routes=routes)
    files = render(state)
    turned = GatewayState(revision=revision, routes=dict(reversed(routes.items())))
    assert render(turned) == files
    clusters = {c["name"] for c in json.loads(files[CLUSTERS])["resources"]}
    actions = [route["route"] for route in hosts(files[ROUTES])["routes"] if "route" in route]
    mirrors = [mirror for action in actions for mirror in action.get("request_mirror_policies", ())]
    assert {named["cluster"] for named in (*actions, *mirrors)} == clusters
    assert version_of(render(state.model_copy(update={"revision": revision + 1}))[ROUTES]) != version_of(files[ROUTES])


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", "a b:80", "http://x:80", "x:80\n", ""]
)
def test_an_endpoint_is_host_and_port(endpoint):
    with pytest.raises(ValueError, match="must be host:port"):
        backend("a", 100, endpoint)


def test_a_certificate_is_read_from_a_file_that_names_it():
    settings = resolve({}, home="/h", tls_certificate="/c.pem", tls_key="/k.pem")
    data = json.loads(render_bootstrap(settings, Path("/h/gateway")))
    chain = data["static_resources"]["listeners"][0]["filter_chains"][0]
    context = chain["transport_socket"]["typed_config"]["common_tls_context"]
    (secret,) = context["tls_certificate_sds_secret_configs"]
    assert secret["sds_config"]["path_config_source"]["path"] == f"/h/gateway/{CERTIFICATE}"
    assert context["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_2"}
    (resource,) = json.loads(render_certificate(settings))["resources"]
    assert resource["name"] == secret["name"]
    assert resource["tls_certificate"]["private_key"] == {"filename": "/k.pem"}


def counted(name: str, value: int) -> dict:
    return {"name": f"cluster.a-x.{name}", "value": value}


def test_stats_of_a_page():
    buckets = [{"upper_bound": edge, "interval": 0, "cumulative": n} for edge, n in ((10, 0), (20, 4), (9e9, 4))]
    page = {
        "stats": [
            counted("upstream_rq_completed", 9),
            counted("upstream_rq_2xx", 5),
            counted("upstream_rq_5xx", 4),
            counted("upstream_rq_503", 2),
            counted("upstream_cx_destroy_remote_with_active_rq", 3),
            {"name": "cluster.a-x.external.upstream_rq_5xx", "value": 9},
            {"name": "cluster_manager.cds.version_text", "value": "x"},
            {"histograms": [{"name": "cluster.a-x.upstream_rq_time", "buckets": buckets}]},
        ]
    }
    latency = ((10.0, 0), (20.0, 4), (float("inf"), 4))
    # Of three cuts two are told by a 503 already.
    expected = ServiceStats(requests=9, failures=5, ok=5, server_errors=4, p50_ms=15.0, p99_ms=19.9, latency=latency)
    assert read_stats(json.dumps(page)) == {"a-x": expected}
    assert "latency" not in expected.model_dump()


def test_a_percentile_lies_between_the_edges():
    assert percentile_ms((), 0.5) is None
    assert percentile_ms(((10.0, 0), (float("inf"), 0)), 0.5) is None
    assert percentile_ms(((10.0, 2), (float("inf"), 4)), 0.99) == 10.0


def test_a_query_names_the_services_and_no_other():
    assert "a-x%7Cb-x" in query(("a-x", "b-x"))
    assert " " not in query()


def test_the_edges_rise():
    assert sorted(set(LATENCY_EDGES_MS)) == list(LATENCY_EDGES_MS)


SECRET = "s3cr3t-" * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no object"),
        ("null", "holds no object"),
        (f'{{"a": "{SECRET}", "a": "{SECRET}x"}}', "names a client twice"),
        (f'{{"a": "{SECRET}", "b": "{SECRET}"}}', "'a' and 'b' have the same key"),
        ('{"a": "s3cr3t"}', "the key of 'a', must be 16 to 256 visible"),
        (f'{{"a": "{SECRET} "}}', "the key of 'a'"),
        (f'{{"a": ["{SECRET}"]}}', "the key of 'a'"),
        (f'{{"a b": "{SECRET}"}}', "client 'a b', must be"),
    ],
)
def test_a_malformed_key_file_is_told_in_one_line_without_a_key(tmp_path, text, words):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(BadRequest) as caught:
        read_api_keys(tmp_path / "keys.json")
    assert words in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_a_key_file(tmp_path):
    (tmp_path / "keys.json").write_text(json.dumps({"ann": SECRET}))
    assert read_api_keys(tmp_path / "keys.json") == {"ann": SECRET}
    (tmp_path / "keys.json").write_text("{}")
    assert read_api_keys(tmp_path / "keys.json") == {}
    with pytest.raises(BadRequest, match="can't be read: No such file"):
        read_api_keys(tmp_path / "nothing")
