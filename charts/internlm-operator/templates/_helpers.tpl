{{- define "internlm-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "internlm-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "internlm-operator.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "internlm-operator.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "internlm-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "internlm-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "internlm-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "internlm-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "internlm-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "internlm-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "internlm-operator.image" -}}
{{- $image := .image }}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ default .version $image.tag }}{{ end }}
{{- end }}

{{- /* Ports that pods ask names at: DNS. */}}
{{- define "internlm-operator.dns" -}}
ports:
  - {port: 53, protocol: UDP}
  - {port: 53, protocol: TCP}
{{- end }}

{{- /* Who may scrape: a rule without `from` lets everybody in. */}}
{{- define "internlm-operator.metricsIngress" -}}
{{- with .from }}
from:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - {port: {{ .port }}, protocol: TCP}
{{- end }}

{{- /* The rules of each job's NetworkPolicy besides those among its workers, as JSON; empty: none is made. */}}
{{- define "internlm-operator.jobNetworkPolicy" -}}
{{- with .Values.networkPolicy }}
{{- if .jobs.enabled }}
{{- $metrics := include "internlm-operator.metricsIngress" (dict "from" .metricsFrom "port" "metrics") | fromYaml }}
{{- $operator := dict "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" $.Release.Namespace)) "podSelector" (dict "matchLabels" (include "internlm-operator.selectorLabels" $ | fromYaml)) }}
{{- $channel := dict "to" (list $operator) "ports" (list (dict "port" 8443 "protocol" "TCP")) }}
{{- $dns := include "internlm-operator.dns" $ | fromYaml }}
{{- dict "ingress" (list $metrics) "egress" (concat (list $channel $dns) .jobs.egress) | toJson }}
{{- end }}
{{- end }}
{{- end }}
