//! What differs between the generations of GLM, as small choices.

/// How the tensors of a model are named in its files, and which linear layers a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Naming {
    /// `transformer.layers.0.attention...` and `lm_head`: ChatGLM-6B.
    ChatGlm,
    /// `transformer.encoder.layers.0.self_attention...` and `transformer.output_layer`: ChatGLM2-6B,
    /// ChatGLM3-6B and GLM-4-9B as first published.
    ChatGlm2,
    /// `model.layers.0.self_attn...` and `lm_head`, with queries, keys and values in layers of their
    /// own: GLM-4-9B in transformers' own form.
    Glm,
}

/// The norm in front of attention and MLP, and behind the last block; and with it what attention and MLP
/// are added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Layer norm with weight and bias, whose output, times sqrt(56), is also the residual.
    Layer,
    /// RMS norm with a weight; the residual is its input.
    Rms,
}

/// Between the two layers of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU in its tanh form; the first layer has F outputs.
    Gelu,
    /// SwiGLU; the first layer has 2 F outputs, the gate first.
    SwiGlu,
}

/// How the outputs of the query, key and value layer lie in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvLayout {
    /// For each head its query, key and value.
    PerHead,
    /// All query heads, all key heads, all value heads.
    Concatenated,
}

/// The rotary embedding of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryKind {
    /// Halves of a head turned by two positions: ChatGLM-6B.
    TwoDimensional,
    /// Neighbouring pairs in the first `width` elements of a head, turned by
    /// `position / position_divisor * base^(-2 j / width)`.
    Interleaved {
        /// Elements of a head that are turned.
        width: usize,
        /// 10,000 times `rope_ratio` in ChatGLM3-6B-32K and GLM-4; `rope_theta` in transformers' form.
        base: f64,
        /// `rope_ratio` of ChatGLM2-6B-32K; else 1.
        position_divisor: f64,
    },
}

/// The choices that make a generation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Architecture {
    /// Names of tensors.
    pub naming: Naming,
    /// Norms and residuals.
    pub norm: NormKind,
    /// Inside the MLP.
    pub activation: Activation,
    /// Query, key and value in a row.
    pub qkv: QkvLayout,
    /// Whether the query, key and value layers have a bias.
    pub qkv_bias: bool,
    /// Whether the other linear layers of a block have one.
    pub linear_bias: bool,
    /// Rotary embedding.
    pub rotary: RotaryKind,
}

impl Architecture {
    /// ChatGLM-6B.
    pub const CHATGLM: Self = Self {
        naming: Naming::ChatGlm,
        norm: NormKind::Layer,
        activation: Activation::Gelu,
        qkv: QkvLayout::PerHead,
        qkv_bias: true,
        linear_bias: true,
        rotary: RotaryKind::TwoDimensional,
    };

    /// ChatGLM2-6B, of which ChatGLM3-6B and GLM-4-9B differ in names and numbers only.
    pub fn chatglm2(rotary: RotaryKind) -> Self {
        Self {
            naming: Naming::ChatGlm2,
            norm: NormKind::Rms,
            activation: Activation::SwiGlu,
            qkv: QkvLayout::Concatenated,
            qkv_bias: true,
            linear_bias: false,
            rotary,
        }
    }

    /// Outputs of the MLP's first layer over its inner width: 2 where a gate stands beside it.
    pub fn gates(&self) -> usize {
        match self.activation {
            Activation::Gelu => 1,
            Activation::SwiGlu => 2,
        }
    }

    /// Elements of a head that turn with one position: the width of a rotary table row is half of it.
    pub fn rotary_width(&self, head_dim: usize) -> usize {
        match self.rotary {
            RotaryKind::TwoDimensional => head_dim / 2,
            RotaryKind::Interleaved { width, .. } => width,
        }
    }
}
