//! The algebra of an adapted layer: which tensors it has, and what splitting, joining, swapping and scaling do to them.
//!
//! A fact about a module ("its output rows are cut here") is stated once and reaches every tensor through the tensor's
//! [`Role`]. What cannot be expressed for a kind is refused with a reason, never approximated.

mod expand;
mod join;
mod module;
mod tucker;

pub(crate) use module::rank_of;
pub use module::{AlphaSource, Module, Refusal};

/// What a tensor of a module does when the module's output rows are cut, joined or permuted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Its first dimension is the module's output: cut, joined and permuted with it.
    Rows,
    /// Its first dimension is the outer factor of the output in a Kronecker product.
    KronRows,
    /// Does not depend on the output rows: shared by all parts.
    Shared,
    /// Depends on all output rows together (a norm over them): permuting is free, cutting impossible.
    Global,
    /// A number that says something about the others.
    Note,
    /// Known, but only to be renamed.
    Opaque,
}

/// The algebra of an adapter module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// delta = scale * up @ down (LoRA; LoCon with `mid`).
    Lora,
    /// delta = scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise product (LyCORIS LoHa).
    Loha,
    /// delta = scale * kron(w1, w2) (LyCORIS LoKr).
    Lokr,
    /// delta = the stored difference.
    Full,
    /// Differences of a normalisation layer's parameters.
    Norm,
    /// Replaces a parameter.
    Set,
    /// Only a bias difference.
    Bias,
    /// Orthogonal fine-tuning: multiplies the base weight.
    Oft,
    /// Generalised LoRA: needs the base weight.
    Glora,
    /// Scales activations.
    Ia3,
}

impl Kind {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Lora => "lora",
            Kind::Loha => "loha",
            Kind::Lokr => "lokr",
            Kind::Full => "full",
            Kind::Norm => "norm",
            Kind::Set => "set",
            Kind::Bias => "bias",
            Kind::Oft => "oft",
            Kind::Glora => "glora",
            Kind::Ia3 => "ia3",
        }
    }
}

macro_rules! slots {
    ($($variant:ident $name:literal $kind:expr, $role:ident;)*) => {
        /// A tensor's place in a module.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)]
        pub enum Slot { $($variant,)* }

        impl Slot {
            /// Every slot.
            pub const ALL: &'static [Slot] = &[$(Slot::$variant,)*];
            /// The name in tables.
            pub fn name(self) -> &'static str { match self { $(Slot::$variant => $name,)* } }
            /// The kind of module that a tensor in this slot makes; `None` if it can accompany any kind.
            pub fn kind(self) -> Option<Kind> { match self { $(Slot::$variant => $kind,)* } }
            /// What happens to it when output rows are cut.
            pub fn role(self) -> Role { match self { $(Slot::$variant => Role::$role,)* } }
        }
    };
}

slots! {
    Down "down" Some(Kind::Lora), Shared;
    Up "up" Some(Kind::Lora), Rows;
    Mid "mid" Some(Kind::Lora), Shared;
    Alpha "alpha" None, Note;
    Bias "bias" None, Rows;
    Magnitude "magnitude" None, Rows;
    MagnitudeIn "magnitude_in" None, Global;
    Diff "diff" Some(Kind::Full), Rows;
    DiffB "diff_b" None, Rows;
    Set "set" Some(Kind::Set), Rows;
    Reshape "reshape" None, Note;
    WNorm "w_norm" Some(Kind::Norm), Rows;
    BNorm "b_norm" Some(Kind::Norm), Rows;
    HadaW1A "hada_w1_a" Some(Kind::Loha), Rows;
    HadaW1B "hada_w1_b" Some(Kind::Loha), Shared;
    HadaW2A "hada_w2_a" Some(Kind::Loha), Rows;
    HadaW2B "hada_w2_b" Some(Kind::Loha), Shared;
    HadaT1 "hada_t1" Some(Kind::Loha), Opaque;
    HadaT2 "hada_t2" Some(Kind::Loha), Opaque;
    LokrW1 "lokr_w1" Some(Kind::Lokr), KronRows;
    LokrW1A "lokr_w1_a" Some(Kind::Lokr), KronRows;
    LokrW1B "lokr_w1_b" Some(Kind::Lokr), Shared;
    LokrW2 "lokr_w2" Some(Kind::Lokr), Shared;
    LokrW2A "lokr_w2_a" Some(Kind::Lokr), Shared;
    LokrW2B "lokr_w2_b" Some(Kind::Lokr), Shared;
    LokrT2 "lokr_t2" Some(Kind::Lokr), Opaque;
    OftBlocks "oft_blocks" Some(Kind::Oft), Opaque;
    OftRescale "oft_rescale" Some(Kind::Oft), Opaque;
    GloraA1 "glora_a1" Some(Kind::Glora), Opaque;
    GloraA2 "glora_a2" Some(Kind::Glora), Opaque;
    GloraB1 "glora_b1" Some(Kind::Glora), Opaque;
    GloraB2 "glora_b2" Some(Kind::Glora), Opaque;
    Ia3Weight "ia3_weight" Some(Kind::Ia3), Opaque;
    Ia3OnInput "ia3_on_input" Some(Kind::Ia3), Note;
}

impl Slot {
    /// The slot of that name in a table.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|s| s.name() == name)
    }

    /// Whether a normalisation layer or an embedding (a row under `op = "only"`) can have it.
    pub fn fits_only(self) -> bool {
        matches!(self, Slot::Set | Slot::Diff | Slot::DiffB | Slot::WNorm | Slot::BNorm)
    }

    /// Slots of which at least one whole group must be present, for each kind.
    pub fn required(kind: Kind) -> &'static [&'static [&'static [Slot]]] {
        use Slot::*;
        match kind {
            Kind::Lora => &[&[&[Down]], &[&[Up]]],
            Kind::Loha => &[&[&[HadaW1A]], &[&[HadaW1B]], &[&[HadaW2A]], &[&[HadaW2B]]],
            Kind::Lokr => &[&[&[LokrW1], &[LokrW1A, LokrW1B]], &[&[LokrW2], &[LokrW2A, LokrW2B]]],
            Kind::Oft => &[&[&[OftBlocks]]],
            Kind::Glora => &[&[&[GloraA1]], &[&[GloraA2]], &[&[GloraB1]], &[&[GloraB2]]],
            Kind::Ia3 => &[&[&[Ia3Weight]], &[&[Ia3OnInput]]],
            Kind::Full | Kind::Norm | Kind::Set | Kind::Bias => &[],
        }
    }
}
