"""The gateway's files, compared whole; no Envoy needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.release.envoy import CLUSTERS, ROUTES, render, render_bootstrap, union, version_of
from tasks.release.model import Backend, GatewayState
from tasks.release.stats import ServiceStats, read_stats
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(30)
TYPE = "type.googleapis.com/envoy"


def backend(service: str, weight: int = 100, *endpoints: str) -> Backend:
    return Backend(service=service, weight=weight, endpoints=endpoints or ("127.0.0.1:9000",))


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


def test_routes_of_a_canary():
    shares = (backend("digits-a", 95), backend("digits-b", 5))
    text = render(GatewayState(revision=7, routes={"digits": shares}))[ROUTES]
    clusters = [{"name": "digits-a", "weight": 95}, {"name": "digits-b", "weight": 5}]
    action = {"weighted_clusters": {"clusters": clusters}, "timeout": "60s"}
    match = {"path_separated_prefix": "/v2/models/digits"}
    get = match | {"headers": [{"name": ":method", "string_match": {"exact": "GET"}}]}
    safe = "connect-failure,refused-stream,reset-before-request"
    json_type = {"key": "content-type", "value": "application/json"}
    routes = [
        {
            "match": {"path": "/v2/health/live"},
            "direct_response": {"status": 200, "body": {"inline_string": '{"live":true}'}},
            "response_headers_to_add": [{"header": json_type, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
        },
        {"match": get, "route": action | {"retry_policy": retry(f"{safe},reset,gateway-error", 5)}},
        {"match": match, "route": action | {"retry_policy": retry(safe, 30)}},
        not_found("/v2/models/", "no such workload; this gateway serves digits"),
        not_found("/", "no such path; ask /v2/health/live or /v2/models/WORKLOAD/infer"),
    ]
    resource = {
        "@type": f"{TYPE}.config.route.v3.RouteConfiguration",
        "name": "workloads",
        "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}],
        "response_headers_to_remove": ["server"],
    }
    assert json.loads(text) == {"version_info": version_of(text), "resources": [resource]}
    assert version_of(text).startswith("7-")


def not_found(prefix: str, message: str) -> dict:
    return {
        "match": {"prefix": prefix},
        "direct_response": {"status": 404, "body": {"inline_string": message}},
    }


def test_cluster_of_a_service():
    state = GatewayState(routes={"digits": (backend("digits-a", 100, "127.0.0.1:9001", "[::1]:9002"),)})
    text = render(state)[CLUSTERS]
    options = f"{TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions"
    addresses = [("127.0.0.1", 9001), ("::1", 9002)]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}}
        for host, port in addresses
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
    state = GatewayState(routes={"a": (backend("a-x", 100, "replica-1:80"),), "b": (backend("b-x"),)})
    types = {c["name"]: c["type"] for c in json.loads(render(state)[CLUSTERS])["resources"]}
    assert types == {"a-x": "STRICT_DNS", "b-x": "STATIC"}


def test_union_keeps_what_the_routes_on_disk_may_name():
    old = render(GatewayState(revision=1, routes={"a": (backend("a-old"),)}))[CLUSTERS]
    new = render(GatewayState(revision=2, routes={"a": (backend("a-new"),)}))[CLUSTERS]
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


names = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)


@given(st.sets(names, max_size=5), st.integers(0, 9))
def test_every_route_names_a_cluster_and_the_text_is_stable(workloads, revision):
    routes = {name: (backend(f"{name}-x"),) for name in workloads}
    state = GatewayState(revision=revision, routes=routes)
    files = render(state)
    turned = GatewayState(revision=revision, routes=dict(reversed(routes.items())))
    assert render(turned) == files
    clusters = {c["name"] for c in json.loads(files[CLUSTERS])["resources"]}
    hosts = json.loads(files[ROUTES])["resources"][0]["virtual_hosts"][0]["routes"]
    assert {route["route"]["cluster"] for route in hosts if "route" in route} == clusters
    assert version_of(render(state.model_copy(update={"revision": revision + 1}))[ROUTES]) != version_of(
        files[ROUTES]
    )


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", "a b:80", "http://x:80", "x:80\n", ""]
)
def test_an_endpoint_is_host_and_port(endpoint):
    with pytest.raises(ValueError, match="must be host:port"):
        backend("a", 100, endpoint)


def test_stats_of_a_page():
    times = {
        "name": "cluster.a-x.upstream_rq_time",
        "values": [{"interval": None, "cumulative": v} for v in (3.0, 9.0)],
    }
    page = {
        "stats": [
            {"name": "cluster.a-x.upstream_rq_total", "value": 5},
            {"name": "cluster.a-x.upstream_rq_5xx", "value": 2},
            {"name": "cluster.a-x.external.upstream_rq_5xx", "value": 9},
            {"name": "cluster_manager.cds.version_text", "value": "x"},
            {"histograms": {"supported_quantiles": [50, 99], "computed_quantiles": [times]}},
        ]
    }
    assert read_stats(json.dumps(page)) == {
        "a-x": ServiceStats(requests=5, server_errors=2, p50_ms=3.0, p99_ms=9.0)
    }
