/*
 * sign.c
 *		Signatures of what is sent, as Standard Webhooks has them.
 *
 * Called by the worker outside of transactions, and by backends that ask central; no lock.
 *
 * webhook-signature is HMAC-SHA256 over "<webhook-id>.<webhook-timestamp>.<body>", the body as
 * it is sent, compressed if it is.  The file has a key on each line, "whsec_" and base64,
 * the newest first; each signs, so that a receiver may know any of them, and keys change without
 * a gap.  What a key is worth does not depend on TLS: a proxy that ends it cannot change a batch.
 */
#include "postgres.h"

#include <time.h>

#include "common/base64.h"
#include "common/hmac.h"
#include "common/sha2.h"
#include "guc.h"
#include "lib/stringinfo.h"
#include "secret.h"
#include "sign.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"
#include "uuid7.h"

#define KEY_PREFIX		"whsec_"

/* Bytes of a key: what Standard Webhooks recommends. */
#define KEY_MIN			24
#define KEY_MAX			64

/* Most keys that are valid at once. */
#define MAX_KEYS		8

/* 4 bytes for each 3, and the zero. */
#define BASE64_LEN(n)	(((n) + 2) / 3 * 4 + 1)

/* The bytes of a key in the form of the file; their number, -1: it is none. */
static int
decode_key(const char *line, uint8 *key)
{
	size_t		len = strlen(line);
	size_t		prefix = strlen(KEY_PREFIX);
	int			n;

	if (strncmp(line, KEY_PREFIX, prefix) != 0 || len - prefix >= BASE64_LEN(KEY_MAX))
		return -1;
	n = pg_b64_decode(line + prefix, (int) (len - prefix), (void *) key, KEY_MAX);
	return n >= KEY_MIN ? n : -1;
}

/* PostgreSQL's HMAC belongs to a resource owner, and between transactions there is none. */
static void
append_signature(StringInfo signatures, const uint8 *key, int key_len, const char *head, const SmHttpRequest *request)
{
	ResourceOwner outer = CurrentResourceOwner;
	ResourceOwner own = outer ? NULL : ResourceOwnerCreate(NULL, "softmobile signature");
	pg_hmac_ctx *hmac;
	uint8		digest[PG_SHA256_DIGEST_LENGTH];
	char		text[BASE64_LEN(PG_SHA256_DIGEST_LENGTH)];
	int			len;

	if (own != NULL)
		CurrentResourceOwner = own;
	hmac = pg_hmac_create(PG_SHA256);
	if (hmac == NULL ||
		pg_hmac_init(hmac, key, key_len) < 0 ||
		pg_hmac_update(hmac, (const uint8 *) head, strlen(head)) < 0 ||
		pg_hmac_update(hmac, (const uint8 *) request->body, request->body_len) < 0 ||
		pg_hmac_final(hmac, digest, sizeof(digest)) < 0)
		elog(ERROR, "could not compute a signature: %s", pg_hmac_error(hmac));
	pg_hmac_free(hmac);
	CurrentResourceOwner = outer;
	if (own != NULL)
		ResourceOwnerDelete(own);
	len = pg_b64_encode((const void *) digest, sizeof(digest), text, sizeof(text));
	if (len < 0)
		elog(ERROR, "could not encode a signature");
	appendStringInfo(signatures, "%sv1,%.*s", signatures->len > 0 ? " " : "", len, text);
}

const char *
sm_sign_request(SmHttpRequest *request, const char *id)
{
	SmSecret	secret;
	StringInfoData signatures;
	uint8		key[KEY_MAX];
	const char *problem;
	char	   *head;
	char	   *rest = NULL;
	int			nkeys = 0;

	if (sm_signing_key_file[0] == '\0')
		return NULL;
	problem = sm_secret_read(sm_signing_key_file, "signing key", &secret);
	if (problem != NULL)
		return problem;

	if (id == NULL)
	{
		pg_uuid_t	uuid;

		sm_uuid7_generate(GetCurrentTimestamp(), &uuid);
		id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&uuid)));
	}
	request->webhook_id = id;
	request->webhook_timestamp = psprintf("%ld", (long) time(NULL));
	head = psprintf("%s.%s.", id, request->webhook_timestamp);
	initStringInfo(&signatures);
	for (char *line = strtok_r(secret.text, " \t\r\n", &rest); line && !problem; line = strtok_r(NULL, " \t\r\n", &rest))
	{
		int			len = decode_key(line, key);

		if (len < 0)
			problem = "signing key: a line of the file is not whsec_ and 24 to 64 bytes in base64";
		else if (++nkeys > MAX_KEYS)
			problem = "signing key: the file holds more than 8 keys";
		else
			append_signature(&signatures, key, len, head, request);
	}
	explicit_bzero(key, sizeof(key));
	sm_secret_forget(&secret);
	request->webhook_signature = signatures.data;
	return problem;
}
