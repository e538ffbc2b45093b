{
  description = "Multi-scale deformable attention, built by Hugging Face's kernel-builder: nix run .#build-and-copy";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
