package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const pollInterval = 500 * time.Millisecond

// devicePlugin advertises devices that do not exist, so that the scheduler and the kubelet count GPUs as they do on
// a real node: capacity, allocatable, admission, and devices that go bad. Patching the node's status instead would
// be undone by the kubelet whenever it registers again.
type devicePlugin struct {
	api.UnimplementedDevicePluginServer
	count   int
	healthy string // a file with the number of devices that still work; absent means all of them
}

func runDevicePlugin(arguments []string) error {
	flags := flag.NewFlagSet("device-plugin", flag.ExitOnError)
	resource := flags.String("resource", "nvidia.com/gpu", "name of the extended resource")
	count := flags.Int("count", 0, "number of devices")
	healthy := flags.String("healthy-file", "", "file that holds the number of healthy devices")
	dir := flags.String("dir", api.DevicePluginPath, "folder of the kubelet's device plugin sockets")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	socket := strings.ReplaceAll(*resource, "/", "-") + ".sock"
	for {
		plugin := &devicePlugin{count: *count, healthy: *healthy}
		if err := plugin.serve(*dir, socket, *resource); err != nil {
			fmt.Fprintln(os.Stderr, err)
			time.Sleep(pollInterval)
		}
	}
}

// serve returns when the kubelet has thrown our socket away, which it does whenever it starts: then it has to be
// told about us again.
func (p *devicePlugin) serve(dir, socket, resource string) error {
	path := filepath.Join(dir, socket)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()

	connection, err := grpc.NewClient("unix://"+filepath.Join(dir, filepath.Base(api.KubeletSocket)),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: socket, ResourceName: resource}
	if _, err := api.NewRegistrationClient(connection).Register(context.Background(), request); err != nil {
		return err
	}
	for {
		if _, err := os.Stat(path); err != nil {
			return nil
		}
		time.Sleep(pollInterval)
	}
}

func (p *devicePlugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *devicePlugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	for last := -1; ; time.Sleep(pollInterval) {
		if err := stream.Context().Err(); err != nil {
			return err
		}
		healthy := p.healthyDevices()
		if healthy == last {
			continue
		}
		last = healthy
		response := &api.ListAndWatchResponse{}
		for index := range p.count {
			device := &api.Device{ID: fmt.Sprintf("GPU-%d", index), Health: api.Healthy}
			if index >= healthy {
				device.Health = api.Unhealthy
			}
			response.Devices = append(response.Devices, device)
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

func (p *devicePlugin) healthyDevices() int {
	text, err := os.ReadFile(p.healthy)
	if err != nil {
		return p.count
	}
	healthy, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return p.count // caught in the middle of a write
	}
	return healthy
}

// Allocate gives the container the variable that NVIDIA's own plugin gives, and no device file.
func (p *devicePlugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}
