// All Kubernetes components of the lab in one program. The first argument selects the component.
//
//	lab etcd FOLDER                 etcd on 127.0.0.1:2379 without syncs to disk
//	lab kube-apiserver FLAGS...     and kube-controller-manager, kube-scheduler, kube-proxy, kubelet, kubectl
//
// The components are those of the published module k8s.io/kubernetes, unchanged. If the program is started through a link
// with the name of a component, for example `kubectl`, it runs that component. The script lab.sh in this folder starts them.
package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	component := filepath.Base(os.Args[0])
	if command(component) == nil && component != "etcd" {
		if len(os.Args) < 2 {
			fmt.Fprintln(os.Stderr, "lab: the component is missing: one of etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy, kubelet, kubectl")
			os.Exit(64)
		}
		component = os.Args[1]
		os.Args = os.Args[1:]
	}
	if component == "etcd" {
		if err := etcd(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "lab: etcd:", err)
			os.Exit(1)
		}
		return
	}
	chosen := command(component)
	if chosen == nil {
		fmt.Fprintf(os.Stderr, "lab: unknown component %q\n", component)
		os.Exit(64)
	}
	os.Exit(cli.Run(chosen()))
}

// command returns the constructor of a component's command, or nil. The constructors register flags and metrics, so only
// that of the selected component may be called.
func command(component string) func() *cobra.Command {
	switch component {
	case "kube-apiserver":
		return apiserver.NewAPIServerCommand
	case "kube-controller-manager":
		return controllers.NewControllerManagerCommand
	case "kube-scheduler":
		return func() *cobra.Command { return scheduler.NewSchedulerCommand() }
	case "kube-proxy":
		return proxy.NewProxyCommand
	case "kubelet":
		return func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }
	case "kubectl":
		return kubectl.NewDefaultKubectlCommand
	}
	return nil
}

// etcd runs an etcd server in a folder until it receives a signal.
func etcd(arguments []string) error {
	if len(arguments) != 1 {
		return fmt.Errorf("usage: lab etcd FOLDER")
	}
	config := embed.NewConfig()
	config.Dir = arguments[0]
	config.UnsafeNoFsync = true
	config.LogLevel = "warn"
	client := url.URL{Scheme: "http", Host: "127.0.0.1:2379"}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	store, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer store.Close()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	select {
	case <-stop:
		return nil
	case err := <-store.Err():
		return err
	}
}
