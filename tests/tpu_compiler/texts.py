"""Texts of compiled programs, shortened from those that XLA prints for TPUs."""

from __future__ import annotations

STEP = """\
HloModule jit_run, is_scheduled=true

%fused.1 (p.1: bf16[8,6144], p.2: bf16[6144,3072]) -> f32[8,3072] {
  %p.1 = bf16[8,6144]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[6144,3072]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = f32[8,3072]{1,0:T(8,128)S(1)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

ENTRY %main.1_spmd (param.1: bf16[8,6144], param.2: bf16[6144,3072]) -> f32[8,3072] {
  %param.1 = bf16[8,6144]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="args[1]"}
  %param.2 = bf16[6144,3072]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="args[0][\\'causal_transformer_shard/~/layer_1/~/linear_4\\'][\\'w\\']"}
  %copy-start.1 = (bf16[6144,3072]{1,0:T(8,128)(2,1)S(1)}, bf16[6144,3072]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%param.2)
  %copy-done.1 = bf16[6144,3072]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %fusion.1 = f32[8,3072]{1,0:T(8,128)S(1)} fusion(%param.1, %copy-done.1), kind=kOutput, calls=%fused.1, metadata={op_name="jit(run)/layer_1/linear_4/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"11880","iteration_bounds":["1","1","3"]}}
  ROOT %psum.1 = f32[8,3072]{1,0:T(8,128)S(1)} all-reduce(%fusion.1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%region.1, metadata={op_name="jit(run)/layer_1/psum"}
}
"""  # noqa: E501 -- as XLA prints them

LOOP = """\
HloModule jit_run, is_scheduled=true

%body.1 (state.1: (s32[], bf16[8,1024,1024])) -> (s32[], bf16[8,1024,1024]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %experts.1 = bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %expert.1 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%experts.1, %i.1), metadata={op_name="jit(run)/slice_of_expert"}
  %gathered.1 = f32[1024]{0:T(1024)S(1)} all-gather(%i.1), channel_id=1, dimensions={0}
  ROOT %next.1 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}) tuple(%i.1, %experts.1)
}

%condition.1 (state.2: (s32[], bf16[8,1024,1024])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit.1 = s32[]{:T(128)} constant(8), metadata={op_name="jit(run)"}
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %limit.1), direction=LT
}

ENTRY %main.2_spmd (param.3: s32[], param.4: bf16[8,1024,1024]) -> (s32[], bf16[8,1024,1024]) {
  %param.4 = bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="args[0][\\'causal_transformer_shard/~/layer_0/~/experts\\'][\\'down\\']"}
  %param.3 = s32[]{:T(128)} parameter(0), metadata={op_name="args[1]"}
  %tuple.1 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}) tuple(%param.3, %param.4)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%condition.1, body=%body.1
}
"""  # noqa: E501

_FUSIONS = """\
%moves (p.3: bf16[2048,1024]) -> bf16[1024,2048] {
  %p.3 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %transposed = bf16[1024,2048]{1,0:T(8,128)(2,1)} transpose(%p.3), dimensions={1,0}
}

%computes (p.4: bf16[2048,1024]) -> bf16[2048,1024] {
  %p.4 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %product = bf16[2048,1024]{1,0:T(8,128)(2,1)} multiply(%p.4, %p.4)
}

%takes_a_row (p.5: bf16[2048,1024], p.6: s32[]) -> bf16[1,1024] {
  %p.5 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %p.6 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %row = bf16[1,1024]{1,0:T(1,128)} dynamic-slice(%p.5, %p.6, %zero)
}

"""

# Each moves a weight of [2048, 1024] within HBM.
COPIES = {
    "copy": "copy(%w)",
    "transpose": "transpose(%w), dimensions={1,0}",
    "fusion": "fusion(%w), kind=kLoop, calls=%moves",
}


def program(operation: str) -> str:
    """A program that applies one operation to a weight."""
    sizes = "1,1024" if "takes_a_row" in operation else "2048,1024"
    return (
        "HloModule jit_run, is_scheduled=true\n\n"
        + _FUSIONS
        + f"""\
ENTRY %main.3_spmd (w: bf16[2048,1024], i: s32[]) -> bf16[{sizes}] {{
  %w = bf16[2048,1024]{{1,0:T(8,128)(2,1)}} parameter(0), metadata={{op_name="args[0]['causal_transformer_shard/~/layer_0/~/linear']['w']"}}
  %i = s32[]{{:T(128)S(6)}} parameter(1), metadata={{op_name="args[1]"}}
  ROOT %moved = bf16[{sizes}]{{1,0:T(1,128)}} {operation}, metadata={{op_name="jit(run)/move"}}
}}
"""  # noqa: E501
    )
