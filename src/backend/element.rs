//! What a buffer can hold.

use half::f16;

/// A plain value that can lie in a buffer: no padding, any bit pattern valid.
pub trait Plain: bytemuck::Pod + Send + Sync {}

impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for u32 {}
impl Plain for i8 {}

/// Elements by their type, for code that knows it and not the storage type.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// IEEE binary32.
    F32(&'a mut [f32]),
    /// IEEE binary16.
    F16(&'a mut [f16]),
}

/// A floating-point storage type. Arithmetic is always done in f32.
pub trait Element: Plain {
    /// The name of the type, as in `precision = "f16"`.
    const NAME: &'static str;
    /// Bytes of one element.
    const SIZE: usize = std::mem::size_of::<Self>();

    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The slice itself where the storage type is f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The slice itself where the storage type is f32.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// The slice by what it is.
    fn by_type(values: &mut [Self]) -> ElementsMut<'_>;
    /// Widens a slice into another of the same length.
    fn widen(out: &mut [f32], values: &[Self]);
}

impl Element for f32 {
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }

    fn by_type(values: &mut [Self]) -> ElementsMut<'_> {
        ElementsMut::F32(values)
    }

    fn widen(out: &mut [f32], values: &[Self]) {
        out.copy_from_slice(values);
    }
}

impl Element for f16 {
    const NAME: &'static str = "f16";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    fn by_type(values: &mut [Self]) -> ElementsMut<'_> {
        ElementsMut::F16(values)
    }

    fn widen(out: &mut [f32], values: &[Self]) {
        use half::slice::HalfFloatSliceExt;
        values.convert_to_f32_slice(out);
    }
}
