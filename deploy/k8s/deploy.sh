#!/bin/sh
# Apply an overlay to the cluster of kubectl's context: check what the cluster has, apply, wait, remove what is left.
#
#     deploy/k8s/deploy.sh prod          overlays/prod
#     deploy/k8s/deploy.sh my-mesh       an overlay of your own
set -eu

overlay=${1:?name an overlay: dev, prod, or the directory of your own}
[ -d "$overlay" ] || overlay="$(dirname "$0")/overlays/$overlay"
rendered=$(mktemp)
trap 'rm -f "$rendered"' EXIT
kubectl kustomize "$overlay" >"$rendered"
namespace=$(sed -n 's/^  namespace: //p' "$rendered" | sort -u | head -n 1)

# Before anything is applied: an overlay that is half applied is worse than none.
known=$(kubectl api-versions)
is_known() { echo "$known" | grep -qxF "$1"; }
missing=
for version in $(sed -n 's/^apiVersion: //p' "$rendered" | sort -u); do
    is_known "$version" || missing="$missing $version"
done
if [ -n "$missing" ]; then
    echo "nothing was applied: this cluster does not know$missing" >&2
    echo "deploy/k8s/README.md (Components) says what to install" >&2
    exit 1
fi

# KEDA makes an autoscaler of its own, and refuses a Deployment that has another overlay's.
if grep -qx 'kind: ScaledObject' "$rendered"; then
    kubectl -n "$namespace" delete --ignore-not-found horizontalpodautoscaler unlatch-compute
fi
kubectl apply -f "$rendered"
for deployment in unlatch-compute unlatch-gateway; do
    kubectl -n "$namespace" rollout status "deployment/$deployment" --timeout 10m
done

# Objects of other overlays. Only now, since pods of the version before read their ConfigMaps when they restart.
# Certificates and their authorities are never removed.
allowed=
for kind in core/v1/ConfigMap autoscaling/v2/HorizontalPodAutoscaler networking.k8s.io/v1/NetworkPolicy \
    keda.sh/v1alpha1/ScaledObject monitoring.coreos.com/v1/PodMonitor monitoring.coreos.com/v1/PrometheusRule; do
    version=${kind%/*}
    if is_known "${version#core/}"; then allowed="$allowed --prune-allowlist $kind"; fi
done
# shellcheck disable=SC2086 (several words)
kubectl apply -f "$rendered" --prune --selector app.kubernetes.io/part-of=unlatch $allowed
