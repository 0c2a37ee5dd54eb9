/*
 * encode.c
 *		Rows as JSON, byte for byte as row_to_json() writes them.
 *
 * Called by the capture trigger once or twice for every changed row, in the
 * selling transaction and in a memory context that lives for that row.  The core
 * looks every column's type up for every row; here it is looked up once per
 * table and backend.  What is rare (arrays, composites, types with a cast to
 * json) goes to the core's own functions.
 *
 * The text of some types depends on settings of the session: money, interval,
 * bytea, floats, and dates within ranges.  Central must not see the difference,
 * so capture encodes between sm_encode_begin_settings() and its end, under which
 * the output equals row_to_json() under the server's defaults.
 */
#include "postgres.h"

#include "access/sysattr.h"
#include "catalog/pg_type.h"
#include "encode.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "parser/parse_coerce.h"
#include "utils/builtins.h"
#include "utils/bytea.h"
#include "utils/datetime.h"
#include "utils/datum.h"
#include "utils/float.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/pg_locale.h"

#include "common/jsonapi.h"

typedef enum Category
{
	CATEGORY_BOOL,
	CATEGORY_INT2,
	CATEGORY_INT4,
	CATEGORY_INT8,
	CATEGORY_NUMBER,			/* float and numeric: NaN and infinity are quoted */
	CATEGORY_DATETIME,
	CATEGORY_TEXT,				/* varlena text, no output function needed */
	CATEGORY_JSON,				/* output is JSON already */
	CATEGORY_ARRAY,
	CATEGORY_COMPOSITE,
	CATEGORY_CAST,				/* cast function to json */
	CATEGORY_OTHER				/* output function, quoted */
} Category;

typedef struct Column
{
	bool		dropped;
	Category	category;
	Oid			base_type;
	bool		byval;
	int16		typlen;
	FmgrInfo	output;			/* output function; cast function for CATEGORY_CAST */
	FmgrInfo	text_output;	/* output function, always */
	char	   *key;			/* "name": */
	int			key_len;
} Column;

struct SmEncoder
{
	int			natts;
	bool		has_money;
	Column		column[FLEXIBLE_ARRAY_MEMBER];
};

static Category
categorize(Oid typid, Oid *cast_function)
{
	CoercionPathType path;

	*cast_function = InvalidOid;
	switch (typid)
	{
		case BOOLOID:
			return CATEGORY_BOOL;
		case INT2OID:
			return CATEGORY_INT2;
		case INT4OID:
			return CATEGORY_INT4;
		case INT8OID:
			return CATEGORY_INT8;
		case FLOAT4OID:
		case FLOAT8OID:
		case NUMERICOID:
			return CATEGORY_NUMBER;
		case DATEOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
			return CATEGORY_DATETIME;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
			return CATEGORY_TEXT;
		case JSONOID:
		case JSONBOID:
			return CATEGORY_JSON;
		case ANYARRAYOID:
		case ANYCOMPATIBLEARRAYOID:
		case RECORDARRAYOID:
			return CATEGORY_ARRAY;
	}
	if (OidIsValid(get_element_type(typid)))
		return CATEGORY_ARRAY;
	if (type_is_rowtype(typid))
		return CATEGORY_COMPOSITE;
	/* Only types that are not built in may bring their own cast, as in the core. */
	if (typid < FirstNormalObjectId)
		return CATEGORY_OTHER;
	path = find_coercion_pathway(JSONOID, typid, COERCION_EXPLICIT, cast_function);
	if (path == COERCION_PATH_FUNC && OidIsValid(*cast_function))
		return CATEGORY_CAST;
	return CATEGORY_OTHER;
}

static void
describe_column(Column *column, Form_pg_attribute att, MemoryContext cxt)
{
	Oid			output;
	Oid			cast;
	bool		varlena;
	StringInfoData key;

	column->dropped = att->attisdropped;
	if (column->dropped)
		return;
	column->base_type = getBaseType(att->atttypid);
	column->byval = att->attbyval;
	column->typlen = att->attlen;
	column->category = categorize(column->base_type, &cast);
	getTypeOutputInfo(column->base_type, &output, &varlena);
	fmgr_info_cxt(output, &column->text_output, cxt);
	if (column->category == CATEGORY_CAST)
		fmgr_info_cxt(cast, &column->output, cxt);
	else
		column->output = column->text_output;

	initStringInfo(&key);
	escape_json(&key, NameStr(att->attname));
	appendStringInfoChar(&key, ':');
	column->key = key.data;
	column->key_len = key.len;
}

SmEncoder *
sm_encode_create(TupleDesc desc, MemoryContext cxt)
{
	MemoryContext caller = MemoryContextSwitchTo(cxt);
	SmEncoder  *encoder = palloc0(offsetof(SmEncoder, column) + sizeof(Column) * desc->natts);

	encoder->natts = desc->natts;
	for (int i = 0; i < desc->natts; i++)
	{
		describe_column(&encoder->column[i], TupleDescAttr(desc, i), cxt);
		encoder->has_money |= encoder->column[i].base_type == MONEYOID ||
			encoder->column[i].category == CATEGORY_COMPOSITE || encoder->column[i].category == CATEGORY_ARRAY;
	}
	MemoryContextSwitchTo(caller);
	return encoder;
}

static void
set_for_encoding(const char *name, const char *value, int *nest)
{
	if (*nest < 0)
		*nest = NewGUCNestLevel();
	(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
}

int
sm_encode_begin_settings(const SmEncoder *encoder)
{
	int			nest = -1;

	if (DateStyle != USE_ISO_DATES)
		set_for_encoding("datestyle", "ISO", &nest);
	if (IntervalStyle != INTSTYLE_POSTGRES)
		set_for_encoding("intervalstyle", "postgres", &nest);
	if (extra_float_digits < 1)
		set_for_encoding("extra_float_digits", "1", &nest);
	if (bytea_output != BYTEA_OUTPUT_HEX)
		set_for_encoding("bytea_output", "hex", &nest);
	if (encoder->has_money && strcmp(locale_monetary, "C") != 0)
		set_for_encoding("lc_monetary", "C", &nest);
	return nest;
}

void
sm_encode_end_settings(int nest)
{
	if (nest >= 0)
		AtEOXact_GUC(true, nest);
}

static void
append_integer(StringInfo out, int64 value)
{
	enlargeStringInfo(out, MAXINT8LEN + 1);
	out->len += pg_lltoa(value, out->data + out->len);
	out->data[out->len] = '\0';
}

/*
 * Most texts need no escaping: copy whole stretches, and leave what is special to
 * the core.
 */
static void
append_text(StringInfo out, const char *data, int len)
{
	for (int i = 0; i < len; i++)
		if ((unsigned char) data[i] < ' ' || data[i] == '"' || data[i] == '\\')
		{
			escape_json(out, pnstrdup(data, len));
			return;
		}
	enlargeStringInfo(out, len + 2);
	appendStringInfoCharMacro(out, '"');
	appendBinaryStringInfo(out, data, len);
	appendStringInfoCharMacro(out, '"');
}

static void
append_value(Column *column, Datum value, StringInfo out)
{
	char		buf[MAXDATELEN + 1];
	char	   *str;

	switch (column->category)
	{
		case CATEGORY_BOOL:
			appendStringInfoString(out, DatumGetBool(value) ? "true" : "false");
			break;
		case CATEGORY_INT2:
			append_integer(out, DatumGetInt16(value));
			break;
		case CATEGORY_INT4:
			append_integer(out, DatumGetInt32(value));
			break;
		case CATEGORY_INT8:
			append_integer(out, DatumGetInt64(value));
			break;
		case CATEGORY_NUMBER:
			str = OutputFunctionCall(&column->output, value);
			if (IsValidJsonNumber(str, strlen(str)))
				appendStringInfoString(out, str);
			else
				escape_json(out, str);
			break;
		case CATEGORY_DATETIME:
			JsonEncodeDateTime(buf, value, column->base_type, NULL);
			appendStringInfoCharMacro(out, '"');
			appendStringInfoString(out, buf);
			appendStringInfoCharMacro(out, '"');
			break;
		case CATEGORY_TEXT:
			{
				struct varlena *packed = (struct varlena *) PG_DETOAST_DATUM_PACKED(value);

				append_text(out, VARDATA_ANY(packed), VARSIZE_ANY_EXHDR(packed));
			}
			break;
		case CATEGORY_JSON:
			appendStringInfoString(out, OutputFunctionCall(&column->output, value));
			break;
		case CATEGORY_ARRAY:
			appendStringInfoString(out, TextDatumGetCString(DirectFunctionCall1(array_to_json, value)));
			break;
		case CATEGORY_COMPOSITE:
			appendStringInfoString(out, TextDatumGetCString(DirectFunctionCall1(row_to_json, value)));
			break;
		case CATEGORY_CAST:
			appendStringInfoString(out, TextDatumGetCString(FunctionCall1(&column->output, value)));
			break;
		case CATEGORY_OTHER:
			escape_json(out, OutputFunctionCall(&column->output, value));
			break;
	}
}

static void
append_column(SmEncoder *encoder, int i, TupleTableSlot *slot, StringInfo out)
{
	if (slot->tts_isnull[i])
		appendStringInfoString(out, "null");
	else
		append_value(&encoder->column[i], slot->tts_values[i], out);
}

void
sm_encode_row(SmEncoder *encoder, TupleTableSlot *slot, StringInfo out)
{
	bool		first = true;

	slot_getallattrs(slot);
	appendStringInfoChar(out, '{');
	for (int i = 0; i < encoder->natts; i++)
	{
		Column	   *column = &encoder->column[i];

		if (column->dropped)
			continue;
		if (!first)
			appendStringInfoCharMacro(out, ',');
		first = false;
		appendBinaryStringInfo(out, column->key, column->key_len);
		append_column(encoder, i, slot, out);
	}
	appendStringInfoChar(out, '}');
}

/* Equal as stored; a value out of line that was not touched has the same pointer. */
static bool
same_value(const Column *column, Datum a, Datum b)
{
	if (column->typlen == -1 && !column->byval)
	{
		struct varlena *x = (struct varlena *) DatumGetPointer(a);
		struct varlena *y = (struct varlena *) DatumGetPointer(b);

		if (VARATT_IS_EXTERNAL_ONDISK(x) && VARATT_IS_EXTERNAL_ONDISK(y) &&
			memcmp(x, y, VARSIZE_EXTERNAL(x)) == 0)
			return true;
	}
	return datum_image_eq(a, b, column->byval, column->typlen);
}

int
sm_encode_changed(SmEncoder *encoder, TupleTableSlot *oldslot, TupleTableSlot *newslot, StringInfo out)
{
	int			changed = 0;

	slot_getallattrs(oldslot);
	slot_getallattrs(newslot);
	appendStringInfoChar(out, '{');
	for (int i = 0; i < encoder->natts; i++)
	{
		Column	   *column = &encoder->column[i];

		if (column->dropped)
			continue;
		if (oldslot->tts_isnull[i] && newslot->tts_isnull[i])
			continue;
		if (!oldslot->tts_isnull[i] && !newslot->tts_isnull[i] &&
			same_value(column, oldslot->tts_values[i], newslot->tts_values[i]))
			continue;
		if (changed++ > 0)
			appendStringInfoCharMacro(out, ',');
		appendBinaryStringInfo(out, column->key, column->key_len);
		append_column(encoder, i, oldslot, out);
	}
	appendStringInfoChar(out, '}');
	return changed;
}

void
sm_encode_value(SmEncoder *encoder, TupleTableSlot *slot, AttrNumber attnum, StringInfo out)
{
	slot_getsomeattrs(slot, attnum);
	append_column(encoder, attnum - 1, slot, out);
}

void
sm_encode_text(SmEncoder *encoder, TupleTableSlot *slot, AttrNumber attnum, StringInfo out)
{
	Column	   *column = &encoder->column[attnum - 1];

	slot_getsomeattrs(slot, attnum);
	Assert(!slot->tts_isnull[attnum - 1]);
	appendStringInfoString(out, OutputFunctionCall(&column->text_output, slot->tts_values[attnum - 1]));
}
