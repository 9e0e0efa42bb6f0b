use super::*;

/// The edited text without the table.
fn edited(text: &str) -> String {
    let rewritten = rewrite(text, Entries::Table).unwrap().text;
    rewritten[..rewritten.find("\n# 1 \"entry points\"").unwrap()].to_owned()
}

fn refused(text: &str) -> RewriteError {
    rewrite(text, Entries::Table).unwrap_err()
}

#[test]
fn constructions_become_calls() {
    assert_eq!(edited("x = float4(a, b);"), "x = msl_make<float4>(a, b);");
    assert_eq!(edited("x = metal::half2(a);"), "x = msl_make<metal::half2>(a);");
    assert_eq!(edited("x = vec<T, 4>(a, b);"), "x = msl_make<vec<T, 4>>(a, b);");
    assert_eq!(edited("using V = vec<half, 2>; V v = V(1, 2);"), "using V = vec<half, 2>; V v = msl_make<V>(1, 2);");
    assert_eq!(edited("x = uint2(int2(y));"), "x = msl_make<uint2>(msl_make<int2>(y));");
}

#[test]
fn declarators_and_conversion_operators_are_left_alone() {
    for text in ["void f(thread float4 (&tile)[3]);", "float4 (*p)[2];", "operator float4() const;", "float4 x[2];"] {
        assert_eq!(edited(text), text);
    }
    assert_eq!(edited("x = float4(*p);"), "x = msl_make<float4>(*p);");
}

#[test]
fn casts_become_conversions() {
    assert_eq!(edited("x = (float4)y.xyzw;"), "x = msl_cast<float4>{} ->*  y.xyzw;".replace("  ", " "));
    assert_eq!(edited("x = (float4)(half4)y;"), "x = msl_cast<float4>{} ->* msl_cast<half4>{} ->* y;");
    assert_eq!(edited("return (vec<T, 2>)-y;"), "return msl_cast<vec<T, 2>>{} ->* -y;");
    let template = "template <typename T> T f(float x) { return (T)x * sizeof(T); }";
    assert_eq!(edited(template), template.replace("(T)x", "msl_cast<T>{} ->* x"));
    for text in [
        "f(float4) + 1;",
        "sizeof(float4) * n;",
        "template <class... T> int n = sizeof...(T) + 1;",
        "x = (float)y;",
        "void f(float4) const;",
    ] {
        assert_eq!(edited(text), text);
    }
}

#[test]
fn narrow_scalars_convert_where_a_text_has_both() {
    assert_eq!(edited("bfloat y = bfloat(x);"), "bfloat y = msl_make<bfloat>(x);");
    assert_eq!(edited("bfloat y; x = (half)y;"), "bfloat y; x = msl_cast<half>{} ->* y;");
    assert_eq!(edited("half y = half(x);"), "half y = half(x);");
}

#[test]
fn threadgroup_arrays_become_references() {
    let text = edited("kernel void k() { threadgroup half a[2][N * 8], b; threadgroup half* p = a[0]; }");
    assert!(text.contains("typedef half msl_type_of_a[2][N * 8];"), "{text}");
    assert!(text.contains("msl_threadgroup_storage<msl_type_of_a, 0>"), "{text}");
    assert!(text.contains("typedef half msl_type_of_b;"), "{text}");
    assert!(text.contains("threadgroup half* p = a[0];"), "{text}");
    let message = refused("kernel void k() { threadgroup float x = 1.0f; }").message;
    assert!(message.contains("no initial value"), "{message}");
    let many = "threadgroup int x; ".repeat(MAX_ARRAYS + 1);
    assert!(refused(&format!("kernel void k() {{ {many} }}")).message.contains("more than 64"));
}

#[test]
fn attributes_vanish_and_lines_stay() {
    let text = "kernel void k(device int* x [[\n buffer(0) ]],\n uint i [[thread_position_in_grid]])\n{}";
    assert_eq!(edited(text), "kernel void k(device int* x \n,\n uint i )\n{}");
    assert_eq!(edited("[[maybe_unused]] int x;"), "[[maybe_unused]] int x;");
}

#[test]
fn entries_are_kernels_and_instantiations() {
    let text = "kernel void a() {} template <typename T> kernel void b() {} void c() {}
        template [[host_name(\"b_half\")]] kernel void b<half>(); [[kernel]] void d() {}";
    assert_eq!(rewrite(text, Entries::Table).unwrap().entries, ["a", "b_half", "d"]);
}

#[test]
fn structs_get_constructors_unless_braces_initialise_them() {
    assert!(edited("struct S { int x; };").contains("S(device const S &msl_other)"));
    for text in ["struct S { int x; }; S s = {1};", "struct S { int x; }; S s{1};", "struct S { S(int); };"] {
        assert_eq!(edited(text), text);
    }
}

#[test]
fn what_is_not_simulated_is_named() {
    let cases = [
        ("double x;", "no type double", 0),
        ("constant int n [[function_constant(0)]];", "function constants", 17),
        ("kernel void k(texture2d<float> t [[texture(0)]]) {}", "[[texture]] is not simulated", 33),
        ("kernel void k(uint i) {}", "without an attribute", 14),
        ("kernel void k( {", "no match", 13),
    ];
    for (text, message, at) in cases {
        let error = refused(text);
        assert!(error.message.contains(message), "{}", error.message);
        assert_eq!(error.at, at, "{text}");
    }
}
