// Calls a kernel that kills its worker, with 2 MiB, on a channel with the service config of docs/clients.md that keeps
// large calls; prints status and reason.
import com.google.protobuf.ByteString;
import inference.GRPCInferenceServiceGrpc;
import inference.Inference.InferParameter;
import inference.Inference.ModelInferRequest;
import inference.Inference.ModelInferRequest.InferInputTensor;
import io.grpc.ManagedChannelBuilder;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.concurrent.TimeUnit;

public class Retries {
    public static void main(String[] arguments) throws Exception {
        var channel = ManagedChannelBuilder.forTarget(arguments[0])
            .usePlaintext()
            .defaultServiceConfig(RetryConfig.CONFIG)
            .enableRetry()
            .perRpcBufferLimit(64 << 20)
            .retryBufferSize(256 << 20)
            .build();
        var request = ModelInferRequest.newBuilder()
            .setModelName("dies")
            .putParameters("how", InferParameter.newBuilder().setStringParam("exit").build())
            .addInputs(InferInputTensor.newBuilder().setName("x").setDatatype("FP64").addShape(1 << 18))
            .addRawInputContents(ByteString.copyFrom(new byte[8 << 18]));
        try {
            GRPCInferenceServiceGrpc.newBlockingStub(channel)
                .withDeadlineAfter(20, TimeUnit.SECONDS)
                .modelInfer(request.build());
        } catch (StatusRuntimeException failed) {
            System.out.println(failed.getStatus().getCode());
            for (var detail : StatusProto.fromThrowable(failed).getDetailsList()) {
                if (detail.getTypeUrl().endsWith("/google.rpc.ErrorInfo")) {
                    // Debian's classes have no ErrorInfo. Its first field is the reason.
                    var info = detail.getValue().newCodedInput();
                    info.readTag();
                    System.out.println(info.readString());
                }
            }
        }
        channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
    }
}
