//! The few edits that turn preprocessed MSL into text that plain clang compiles, and the table of entry points.
//!
//! | MSL | becomes | because |
//! | --- | --- | --- |
//! | `[[buffer(0)]]` and its like | nothing; noted in the table | `threadgroup` in `[[threadgroup(0)]]` is a macro |
//! | `threadgroup half tile[64];` | a reference to an array of the runtime | red zones; C++ has no such storage |
//! | `float4(a, b)` | `msl_make<float4>(a, b)` | clang's vectors have no constructors of several parts |
//! | `(float4)x` | `msl_cast<float4>{} ->* x` | clang's cast keeps the bits where MSL converts |
//! | `bfloat(x)`, `half(x)` in a text with `bfloat` | as for vectors | clang refuses the one for the other |
//! | `struct S { .. };` | constructors that copy from every address space | plain C++ copies within one space |
//! | `template [[host_name("f")]] kernel void k<half>(..);` | nothing; noted in the table | the table instantiates it |

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt::Write as _;

use crate::token::{Kind, Token, closing, tokenize};

/// `MSL_MAX_ARRAYS` of the runtime.
const MAX_ARRAYS: usize = 64;

/// What the text asks of its compiler that it cannot have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewriteError {
    /// Byte offset in the preprocessed text.
    pub at: usize,
    /// What is wrong.
    pub message: String,
}

/// What the name of an entry point follows in the name of the number of its threads.
pub const MAX_THREADS: &str = "msl_max_threads_";

/// The text for clang.
#[derive(Debug)]
pub struct Rewritten {
    /// The edited text followed by the table of entry points.
    pub text: String,
    /// Names of the entry points.
    pub entries: Vec<String>,
}

/// A parameter's or a function's `[[name(argument)]]`.
struct Attribute<'a> {
    name: &'a str,
    argument: &'a str,
    at: usize,
}

struct Kernel<'a> {
    name: &'a str,
    is_template: bool,
    sources: Vec<String>,
    max_threads: String,
    array_slots: Vec<usize>,
}

struct Entry<'a> {
    host_name: String,
    /// `name` or `name<arguments>`.
    function: String,
    kernel: &'a str,
}

struct Edit {
    start: usize,
    end: usize,
    text: String,
}

struct Rewriter<'a> {
    text: &'a str,
    tokens: Vec<Token<'a>>,
    edits: Vec<Edit>,
    kernels: Vec<Kernel<'a>>,
    entries: Vec<Entry<'a>>,
    array_count: usize,
}

/// What is appended to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entries {
    /// A table for the runtime on this processor.
    Table,
    /// One `nvptx_kernel` for each, under the name that a pipeline asks for.
    Ptx,
}

/// Edits preprocessed text.
///
/// # Errors
/// Constructs that the simulator does not know: function constants, textures, `double`.
pub fn rewrite(text: &str, entries: Entries) -> Result<Rewritten, RewriteError> {
    let tokens = tokenize(text);
    let mut rewriter =
        Rewriter { text, tokens, edits: Vec::new(), kernels: Vec::new(), entries: Vec::new(), array_count: 0 };
    rewriter.refuse_foreign_words()?;
    rewriter.find_kernels()?;
    rewriter.copy_structs();
    rewriter.convert_vectors();
    rewriter.drop_attributes()?;
    Ok(rewriter.finish(entries))
}

fn source_kind(attribute: &str) -> Option<&'static str> {
    Some(match attribute {
        "buffer" => "MSL_BUFFER",
        "threadgroup" => "MSL_THREADGROUP_MEMORY",
        "thread_position_in_grid" => "MSL_THREAD_POSITION_IN_GRID",
        "threadgroup_position_in_grid" => "MSL_THREADGROUP_POSITION_IN_GRID",
        "thread_position_in_threadgroup" => "MSL_THREAD_POSITION_IN_THREADGROUP",
        "threads_per_grid" => "MSL_THREADS_PER_GRID",
        "threads_per_threadgroup" => "MSL_THREADS_PER_THREADGROUP",
        "threadgroups_per_grid" => "MSL_THREADGROUPS_PER_GRID",
        "thread_index_in_threadgroup" => "MSL_THREAD_INDEX_IN_THREADGROUP",
        "simdgroup_index_in_threadgroup" => "MSL_SIMDGROUP_INDEX_IN_THREADGROUP",
        "thread_index_in_simdgroup" => "MSL_THREAD_INDEX_IN_SIMDGROUP",
        "simdgroups_per_threadgroup" => "MSL_SIMDGROUPS_PER_THREADGROUP",
        "threads_per_simdgroup" => "MSL_THREADS_PER_SIMDGROUP",
        _ => return None,
    })
}

impl<'a> Rewriter<'a> {
    fn token(&self, index: usize) -> Option<&Token<'a>> {
        self.tokens.get(index)
    }

    fn is(&self, index: usize, text: &str) -> bool {
        self.token(index).is_some_and(|token| token.is(text))
    }

    fn error<T>(&self, index: usize, message: impl Into<String>) -> Result<T, RewriteError> {
        let at = self.token(index).map_or(self.text.len(), |token| token.start);
        Err(RewriteError { at, message: message.into() })
    }

    fn close(&self, open: usize) -> Result<usize, RewriteError> {
        match closing(&self.tokens, open) {
            Some(index) => Ok(index),
            None => self.error(open, format!("no match for '{}'", self.tokens[open].text)),
        }
    }

    fn refuse_foreign_words(&self) -> Result<(), RewriteError> {
        for (index, token) in self.tokens.iter().enumerate() {
            if token.is("double") {
                return self.error(index, "MSL has no type double");
            }
            if token.is("function_constant") {
                return self.error(index, "function constants are not simulated: write a #define");
            }
        }
        Ok(())
    }

    /// Whether `[[` stands at `index`.
    fn opens_attribute(&self, index: usize) -> bool {
        self.is(index, "[") && self.is(index + 1, "[") && self.tokens[index].end() == self.tokens[index + 1].start
    }

    fn attribute(&self, index: usize) -> Result<(Attribute<'a>, usize), RewriteError> {
        let end = self.close(index)?;
        let name = self.tokens[index + 2];
        let argument = if self.is(index + 3, "(") {
            let close = self.close(index + 3)?;
            &self.text[self.tokens[index + 3].end()..self.tokens[close].start]
        } else {
            ""
        };
        Ok((Attribute { name: name.text, argument: argument.trim(), at: index }, end + 1))
    }

    /// The attributes that stand from `index` on, and the index behind them.
    fn attributes(&self, mut index: usize) -> Result<(Vec<Attribute<'a>>, usize), RewriteError> {
        let mut found = Vec::new();
        while self.opens_attribute(index) {
            let (attribute, next) = self.attribute(index)?;
            found.push(attribute);
            index = next;
        }
        Ok((found, index))
    }

    fn find_kernels(&mut self) -> Result<(), RewriteError> {
        let mut index = 0;
        while index < self.tokens.len() {
            index = if self.is(index, "template") && !self.is(index + 1, "<") {
                self.explicit_instantiation(index)?
            } else if self.is(index, "kernel") && !self.opens_attribute(index.wrapping_sub(2)) {
                self.kernel(index, index + 1)?
            } else if self.opens_attribute(index) && self.is(index + 2, "kernel") && self.is(index + 3, "]") {
                self.kernel(index, index)?
            } else {
                index + 1
            };
        }
        Ok(())
    }

    /// Attributes and a template head that stand before `index`.
    fn before(&self, mut index: usize) -> (Option<String>, bool) {
        let mut max_threads = None;
        while index >= 2 && self.is(index - 1, "]") && self.is(index - 2, "]") {
            let Some(open) = (0..index - 1)
                .rev()
                .find(|&open| self.opens_attribute(open) && closing(&self.tokens, open) == Some(index - 1))
            else {
                break;
            };
            if let Ok((attribute, _)) = self.attribute(open)
                && attribute.name == "max_total_threads_per_threadgroup"
            {
                max_threads = Some(attribute.argument.to_owned());
            }
            index = open;
        }
        let is_template = index >= 1
            && self.is(index - 1, ">")
            && (0..index).rev().any(|open| {
                self.is(open, "template")
                    && self.is(open + 1, "<")
                    && closing(&self.tokens, open + 1) == Some(index - 1)
            });
        (max_threads, is_template)
    }

    /// A kernel whose `kernel` or `[[kernel]]` stands at `start`.
    fn kernel(&mut self, start: usize, attributes_from: usize) -> Result<usize, RewriteError> {
        let (mut max_threads, is_template) = self.before(start);
        let (leading, void) = self.attributes(attributes_from)?;
        for attribute in leading {
            if attribute.name == "max_total_threads_per_threadgroup" {
                max_threads = Some(attribute.argument.to_owned());
            }
        }
        if !self.is(void, "void") || !self.is(void + 2, "(") {
            return self.error(start, "a kernel is 'kernel void name(parameters)'");
        }
        let name = self.tokens[void + 1].text;
        let close = self.close(void + 2)?;
        let sources = self.parameters(name, void + 3, close)?;
        let (trailing, body) = self.attributes(close + 1)?;
        for attribute in trailing {
            if attribute.name == "max_total_threads_per_threadgroup" {
                max_threads = Some(attribute.argument.to_owned());
            }
        }
        if !self.is(body, "{") {
            return Ok(body); // a declaration
        }
        let end = self.close(body)?;
        let array_slots = self.threadgroup_arrays(body + 1, end)?;
        if !is_template {
            self.entries.push(Entry { host_name: name.to_owned(), function: name.to_owned(), kernel: name });
        }
        let max_threads = max_threads.unwrap_or_else(|| "0".to_owned());
        self.kernels.push(Kernel { name, is_template, sources, max_threads, array_slots });
        Ok(end + 1)
    }

    /// Where each parameter between `index` and `close` comes from.
    fn parameters(&self, kernel: &str, mut index: usize, close: usize) -> Result<Vec<String>, RewriteError> {
        let mut sources = Vec::new();
        while index < close {
            let mut source = None;
            let start = index;
            while index < close && !self.is(index, ",") {
                if self.opens_attribute(index) {
                    let (attribute, next) = self.attribute(index)?;
                    let Some(kind) = source_kind(attribute.name) else {
                        return self.error(
                            attribute.at,
                            format!("kernel {kernel}: the attribute [[{}]] is not simulated", attribute.name),
                        );
                    };
                    let argument = if attribute.argument.is_empty() { "0" } else { attribute.argument };
                    source = Some(format!("{{{kind}, {argument}}}"));
                    index = next;
                } else if self.is(index, "(") || self.is(index, "[") {
                    index = self.close(index)? + 1;
                } else if self.is(index, "<") {
                    index = closing(&self.tokens, index).unwrap_or(index) + 1;
                } else {
                    index += 1;
                }
            }
            match source {
                Some(source) => sources.push(source),
                None => return self.error(start, format!("kernel {kernel}: a parameter without an attribute")),
            }
            index += 1;
        }
        Ok(sources)
    }

    /// `template [[host_name("f")]] [[kernel]] decltype(k<half>) k<half>;` or with a signature.
    fn explicit_instantiation(&mut self, start: usize) -> Result<usize, RewriteError> {
        let Some(end) = (start..self.tokens.len()).find(|&index| self.is(index, ";")) else {
            return Ok(start + 1);
        };
        let host_name = self.attributes(start + 1)?.0.into_iter().find(|attribute| attribute.name == "host_name");
        let Some(host_name) = host_name else { return Ok(start + 1) };
        // The last `name<arguments>` outside of parentheses is the function.
        let mut function = None;
        let mut index = self.attributes(start + 1)?.1;
        while index < end {
            if self.is(index, "(") || self.is(index, "[") {
                index = self.close(index)?;
            } else if self.tokens[index].kind == Kind::Word && self.is(index + 1, "<") {
                let close = self.close(index + 1)?;
                let text = &self.text[self.tokens[index].start..self.tokens[close].end()];
                function = Some((self.tokens[index].text, text.to_owned()));
                index = close;
            }
            index += 1;
        }
        let Some((kernel, function)) = function else {
            return self.error(start, "host_name is due on an instantiation 'name<arguments>'");
        };
        self.entries.push(Entry { host_name: host_name.argument.trim_matches('"').to_owned(), function, kernel });
        self.blank(self.tokens[start].start, self.tokens[end].end());
        Ok(end + 1)
    }

    /// Arrays and variables in threadgroup memory that a kernel's body declares.
    fn threadgroup_arrays(&mut self, from: usize, to: usize) -> Result<Vec<usize>, RewriteError> {
        let mut slots = Vec::new();
        for index in from..to {
            let begins_statement = ["{", "}", ";"].iter().any(|mark| self.is(index - 1, mark));
            if !self.is(index, "threadgroup") || !begins_statement {
                continue;
            }
            let Some(end) = (index..to).find(|&at| self.is(at, ";")) else { continue };
            let declaration = &self.tokens[index + 1..end];
            if declaration.iter().any(|token| token.is("*") || token.is("&"))
                && !self.has_dimensions_only(index + 1, end)
            {
                continue; // a pointer or reference to threadgroup memory
            }
            let replacement = self.declare_arrays(index + 1, end, &mut slots)?;
            let (start, end) = (self.tokens[index].start, self.tokens[end].end());
            self.edits.push(Edit { start, end, text: replacement });
        }
        Ok(slots)
    }

    /// Whether every `*` and `&` stands inside of brackets, where it multiplies.
    fn has_dimensions_only(&self, from: usize, to: usize) -> bool {
        let mut depth = 0;
        for token in &self.tokens[from..to] {
            match token.text {
                "[" | "(" | "<" => depth += 1,
                "]" | ")" | ">" => depth -= 1,
                "*" | "&" if depth == 0 => return false,
                _ => {}
            }
        }
        true
    }

    fn declare_arrays(&mut self, from: usize, end: usize, slots: &mut Vec<usize>) -> Result<String, RewriteError> {
        // The first name is the last word before the first `[`, `,` or `;` outside of `<>`.
        let mut first = from;
        while first < end {
            if self.is(first, "<") {
                first = self.close(first)?;
            } else if self.is(first, "[") || self.is(first, ",") || self.is(first, "=") {
                break;
            }
            first += 1;
        }
        let mut index = first - 1;
        if index <= from {
            return self.error(from, "a declaration in threadgroup memory needs a type and a name");
        }
        let element_type = self.text[self.tokens[from].start..self.tokens[index].start].trim_end();
        let mut text = String::new();
        loop {
            let name = self.tokens[index].text;
            let mut after = index + 1;
            while self.is(after, "[") {
                after = self.close(after)? + 1;
            }
            if after != end && !self.is(after, ",") {
                return self.error(after, "a variable in threadgroup memory takes no initial value");
            }
            let dimensions = self.text[self.tokens[index].end()..self.tokens[after].start].trim();
            let slot = self.array_count;
            self.array_count += 1;
            if self.array_count > MAX_ARRAYS {
                return self.error(index, format!("more than {MAX_ARRAYS} arrays in threadgroup memory"));
            }
            slots.push(slot);
            let alias = format!("msl_type_of_{name}");
            write!(
                text,
                "typedef {element_type} {alias}{dimensions}; \
                 threadgroup {alias} &{name} = msl_threadgroup_storage<{alias}, {slot}>::array(); "
            )
            .expect("writing to a String does not fail");
            if after == end {
                return Ok(text);
            }
            index = after + 1;
        }
    }

    /// Constructors for copies out of device, constant and threadgroup memory. A struct that is initialised with
    /// braces must stay an aggregate and gets none.
    fn copy_structs(&mut self) {
        for index in 0..self.tokens.len().saturating_sub(2) {
            if !self.is(index, "struct") || self.tokens[index + 1].kind != Kind::Word || !self.is(index + 2, "{") {
                continue;
            }
            let name = self.tokens[index + 1].text;
            let Some(end) = closing(&self.tokens, index + 2) else { continue };
            let has_constructor = (index + 3..end).any(|at| self.is(at, name) && self.is(at + 1, "("));
            let initialised = (0..self.tokens.len()).filter(|&at| at != index + 1 && self.is(at, name)).any(|at| {
                let named = self.token(at + 1).is_some_and(|token| token.kind == Kind::Word);
                let braces = self.is(at + 2, "{") || (self.is(at + 2, "=") && self.is(at + 3, "{"));
                self.is(at + 1, "{") || (named && braces)
            });
            if has_constructor || initialised {
                continue;
            }
            let mut text = format!(
                "{{ {name}() = default; {name}(const {name} &) = default; {name} &operator=(const {name} &) = default; "
            );
            for space in ["device", "constant", "threadgroup"] {
                write!(
                    text,
                    "{name}({space} const {name} &msl_other) {{ metal::msl_copy_object(this, &msl_other); }} "
                )
                .expect("writing to a String does not fail");
            }
            let brace = self.tokens[index + 2];
            self.edits.push(Edit { start: brace.start, end: brace.end(), text });
        }
    }

    /// Names that are vectors, or may be: vector types, aliases of them, template parameters; and 16-bit scalars.
    fn vector_names(&self) -> HashSet<&'a str> {
        let scalars =
            ["float", "half", "bfloat", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "bool"];
        let is_vector = |word: &str| {
            word.strip_suffix(['2', '3', '4']).is_some_and(|scalar| scalars.contains(&scalar)) || word == "vec"
        };
        let mut names: HashSet<&'a str> =
            self.tokens.iter().map(|token| token.text).filter(|text| is_vector(text) && *text != "vec").collect();
        // Plain clang does not convert between half and bfloat.
        if self.tokens.iter().any(|token| token.is("bfloat")) {
            names.extend(["half", "bfloat"]);
        }
        for index in 0..self.tokens.len() {
            let declares_parameter = self.is(index, "typename") || self.is(index, "class");
            let opens = index > 0 && (self.is(index - 1, "<") || self.is(index - 1, ","));
            if declares_parameter && opens && self.token(index + 1).is_some_and(|token| token.kind == Kind::Word) {
                names.insert(self.tokens[index + 1].text);
            }
        }
        for index in 0..self.tokens.len() {
            let Some(end) = (index..self.tokens.len()).find(|&at| self.is(at, ";")) else { break };
            let definition = &self.tokens[index..end];
            let mentions = definition.iter().any(|token| is_vector(token.text) || names.contains(token.text));
            if !mentions {
                continue;
            }
            if self.is(index, "using") && self.is(index + 2, "=") {
                names.insert(self.tokens[index + 1].text);
            } else if self.is(index, "typedef") && self.tokens[end - 1].kind == Kind::Word {
                names.insert(self.tokens[end - 1].text);
            }
        }
        names
    }

    /// Constructions and casts of vectors.
    fn convert_vectors(&mut self) {
        let names = self.vector_names();
        let mut last_cast_end = usize::MAX;
        for index in 0..self.tokens.len() {
            if self.is(index, "(")
                && let Some(close) = self.cast(index, &names, last_cast_end)
            {
                let name = &self.text[self.tokens[index].end()..self.tokens[close].start];
                let text = format!("msl_cast<{}>{{}} ->* ", name.trim());
                self.edits.push(Edit { start: self.tokens[index].start, end: self.tokens[close].end(), text });
                last_cast_end = close;
                continue;
            }
            if let Some(last) = self.construction(index, &names) {
                let metal = index >= 2 && self.is(index - 1, "::") && self.is(index - 2, "metal");
                let start = self.tokens[if metal { index - 2 } else { index }].start;
                let end = self.tokens[last].end();
                let text = format!("msl_make<{}>", &self.text[start..end]);
                self.edits.push(Edit { start, end, text });
            }
        }
    }

    /// The last token of a type name at `index`, if it may be a vector.
    fn vector_type(&self, index: usize, names: &HashSet<&str>) -> Option<usize> {
        let token = self.token(index)?;
        if token.is("vec") && self.is(index + 1, "<") {
            return closing(&self.tokens, index + 1);
        }
        (token.kind == Kind::Word && names.contains(token.text)).then_some(index)
    }

    /// `(type)` before an operand.
    fn cast(&self, open: usize, names: &HashSet<&str>, last_cast_end: usize) -> Option<usize> {
        let name = if self.is(open + 1, "metal") && self.is(open + 2, "::") { open + 3 } else { open + 1 };
        let close = self.vector_type(name, names)? + 1;
        if !self.is(close, ")") {
            return None;
        }
        let operand = self.token(close + 1)?;
        let starts_operand = operand.kind != Kind::Mark || ["(", "*", "&", "~", "!", "+", "-"].contains(&operand.text);
        if !starts_operand || ["const", "volatile", "noexcept"].contains(&operand.text) {
            return None;
        }
        let previous = self.token(open.checked_sub(1)?)?;
        let is_value = match previous.kind {
            Kind::Word => !["return", "case", "else", "do"].contains(&previous.text),
            Kind::Literal => true,
            // The dots of sizeof...(T).
            Kind::Mark => [")", "]", ">", ".", "..."].contains(&previous.text) && open - 1 != last_cast_end,
        };
        (!is_value).then_some(close)
    }

    /// `type(` that constructs: not a declarator such as `float4 (&tile)[3]`, not `operator float4()`.
    fn construction(&self, index: usize, names: &HashSet<&str>) -> Option<usize> {
        let last = self.vector_type(index, names)?;
        if !self.is(last + 1, "(") {
            return None;
        }
        if index > 0
            && ["operator", ".", "->", "typename", "class", "struct"].iter().any(|word| self.is(index - 1, word))
        {
            return None;
        }
        if self.is(last + 2, "&") || self.is(last + 2, "*") {
            let close = closing(&self.tokens, last + 1)?;
            if self.is(close + 1, "[") || self.is(close + 1, "(") {
                return None;
            }
        }
        Some(last)
    }

    /// Removes MSL's attributes; C++'s own stay.
    fn drop_attributes(&mut self) -> Result<(), RewriteError> {
        let standard = ["maybe_unused", "nodiscard", "fallthrough", "likely", "unlikely", "clang", "gnu"];
        let mut index = 0;
        while index < self.tokens.len() {
            if !self.opens_attribute(index) {
                index += 1;
                continue;
            }
            let (attribute, next) = self.attribute(index)?;
            if !standard.contains(&attribute.name) {
                self.blank(self.tokens[index].start, self.tokens[next - 1].end());
            }
            index = next;
        }
        Ok(())
    }

    /// Replaces a stretch by its line breaks.
    fn blank(&mut self, start: usize, end: usize) {
        let breaks = self.text[start..end].matches('\n').count();
        self.edits.push(Edit { start, end, text: "\n".repeat(breaks) });
    }

    fn finish(mut self, entries: Entries) -> Rewritten {
        // An edit inside of another one is covered by it.
        self.edits.sort_by_key(|edit| (edit.start, usize::MAX - edit.end));
        let mut text = String::with_capacity(self.text.len() + 4096);
        let mut at = 0;
        for edit in &self.edits {
            if edit.start < at {
                continue;
            }
            text.push_str(&self.text[at..edit.start]);
            text.push_str(&edit.text);
            at = edit.end;
        }
        text.push_str(&self.text[at..]);
        text.push_str(&match entries {
            Entries::Table => self.table(),
            Entries::Ptx => self.ptx_kernels(),
        });
        let entries = self.entries.into_iter().map(|entry| entry.host_name).collect();
        Rewritten { text, entries }
    }

    /// An entry point for each kernel, and a number that says how many threads of a threadgroup it takes at most. The symbol
    /// of an entry point is given apart, as the kernel's own name is taken.
    fn ptx_kernels(&self) -> String {
        let mut text = String::from("\n# 1 \"entry points\"\n");
        for (number, entry) in self.entries.iter().enumerate() {
            let Some(kernel) = self.kernels.iter().find(|kernel| kernel.name == entry.kernel) else { continue };
            let sources = kernel.sources.iter().fold(String::new(), |all, source| all + source + ", ");
            let signature =
                format!("extern \"C\" __attribute__((nvptx_kernel)) void msl_kernel_{number}(msl_buffers buffers)");
            write!(
                text,
                "static constexpr msl_source msl_sources_{number}[] = {{{sources}{{}}}};\n\
                 extern \"C\" {{ extern const unsigned {MAX_THREADS}{host_name} = {max_threads}; }}\n\
                 {signature} __asm__(\"{host_name}\");\n\
                 {signature} {{ metal::msl_shim<&{function}, msl_sources_{number}>::call(buffers); }}\n",
                host_name = entry.host_name,
                max_threads = kernel.max_threads,
                function = entry.function,
            )
            .expect("writing to a String does not fail");
        }
        text
    }

    /// The table of entry points, which names every instantiation.
    fn table(&self) -> String {
        let mut text = String::from("\n# 1 \"entry points\"\n");
        let mut rows = String::new();
        for (number, entry) in self.entries.iter().enumerate() {
            let Some(kernel) = self.kernels.iter().find(|kernel| kernel.name == entry.kernel) else { continue };
            let slots: Vec<String> = kernel.array_slots.iter().map(ToString::to_string).collect();
            let template = if kernel.is_template { "template " } else { "" };
            write!(
                text,
                "static constexpr msl_source msl_sources_{number}[] = {{{sources}{{}}}}; // {template}{name}\n\
                 static constexpr unsigned msl_slots_{number}[] = {{{slots}{comma}0}};\n",
                sources = kernel.sources.iter().fold(String::new(), |all, source| all + source + ", "),
                name = kernel.name,
                comma = if slots.is_empty() { "" } else { ", " },
                slots = slots.join(", "),
            )
            .expect("writing to a String does not fail");
            writeln!(
                rows,
                "  metal::msl_shim<&{}, msl_sources_{number}>::entry(\"{}\", {}, msl_slots_{number}, {}),",
                entry.function,
                entry.host_name,
                kernel.max_threads,
                kernel.array_slots.len()
            )
            .expect("writing to a String does not fail");
        }
        write!(
            text,
            "extern \"C\" {{\n\
             extern const msl_entry msl_entries[] __attribute__((visibility(\"default\"), used));\n\
             const msl_entry msl_entries[] = {{\n{rows}  {{}}\n}};\n}}\n"
        )
        .expect("writing to a String does not fail");
        text
    }
}
