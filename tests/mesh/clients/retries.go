// Calls a kernel that kills its worker, with 2 MiB, on a channel with a service config that keeps large calls; prints
// the status and the reason.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"example.org/caller/inference"
)

func main() {
	keeps := grpc.WithDefaultCallOptions(grpc.MaxRetryRPCBufferSize(64 << 20))
	channel, err := grpc.Dial(os.Args[1], grpc.WithInsecure(), grpc.WithDefaultServiceConfig(os.Args[2]), keeps)
	if err != nil {
		log.Fatal(err)
	}
	defer channel.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = inference.NewGRPCInferenceServiceClient(channel).ModelInfer(ctx, &inference.ModelInferRequest{
		ModelName: "dies",
		Parameters: map[string]*inference.InferParameter{
			"how": {ParameterChoice: &inference.InferParameter_StringParam{StringParam: "exit"}},
		},
		Inputs:           []*inference.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "FP64", Shape: []int64{1 << 18}}},
		RawInputContents: [][]byte{make([]byte, 8<<18)},
	})
	fmt.Println(status.Code(err))
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Println(info.Reason)
		}
	}
}
