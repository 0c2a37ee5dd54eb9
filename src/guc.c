/*
 * guc.c
 *		All settings of softmobile.
 *
 * Defined once, when the library is loaded: by the postmaster where it is
 * preloaded, else by the first backend function that needs it.  What must be
 * settable with ALTER DATABASE is PGC_SUSET, because a PGC_SIGHUP setting
 * cannot be set for a database.
 */
#include "postgres.h"

#include "guc.h"
#include "mb/pg_wchar.h"
#include "networks.h"
#include "reason.h"
#include "utils/guc.h"

#define SM_MIN_SYNC_INTERVAL		1
#define SM_DEFAULT_SYNC_INTERVAL	1800
#define SM_MIN_RETRY_INTERVAL		1
#define SM_DEFAULT_RETRY_INTERVAL	600
#define SM_MIN_PROBE_INTERVAL		1
#define SM_DEFAULT_PROBE_INTERVAL	15
#define SM_MAX_INTERVAL				(7 * 86400)
#define SM_MIN_ATTEMPTS				1
#define SM_DEFAULT_ATTEMPTS			5
#define SM_MAX_ATTEMPTS				1000
#define SM_MIN_BATCH_EVENTS			1
#define SM_DEFAULT_BATCH_EVENTS		16000
#define SM_MAX_BATCH_EVENTS			20000
#define SM_MIN_BATCH_KB				64
#define SM_DEFAULT_BATCH_KB			12288
#define SM_MAX_BATCH_KB				16384
#define SM_MIN_TIMEOUT_MS			100
#define SM_DEFAULT_CONNECT_MS		5000
#define SM_DEFAULT_REQUEST_MS		30000
#define SM_MAX_TIMEOUT_MS			(3600 * 1000)
#define SM_MIN_RETENTION_MIN		1
#define SM_DEFAULT_RETENTION_MIN	(30 * 24 * 60)
#define SM_MAX_RETENTION_MIN		(10 * 366 * 24 * 60)
#define SM_MIN_BACKUP_WINDOW_MIN	0
#define SM_DEFAULT_BACKUP_WINDOW_MIN (14 * 24 * 60)
#define SM_MIN_REFERENCE_KB			1
#define SM_DEFAULT_REFERENCE_KB		(64 * 1024)
#define SM_MAX_REFERENCE_KB			(256 * 1024)

char	   *sm_central_url = NULL;
char	   *sm_auth_token_file = NULL;
char	   *sm_signing_key_file = NULL;
char	   *sm_ca_file = NULL;
char	   *sm_client_cert_file = NULL;
char	   *sm_client_key_file = NULL;
char	   *sm_central_networks = NULL;
char	   *sm_branch_id = NULL;
char	   *sm_reason = NULL;
int			sm_unknown_branch = SM_UNKNOWN_REGISTER;
bool		sm_enable_purchases_sales = true;
bool		sm_enable_transfers = true;
bool		sm_enable_hybrid_prep = true;
int			sm_sync_interval = SM_DEFAULT_SYNC_INTERVAL;
int			sm_retry_interval = SM_DEFAULT_RETRY_INTERVAL;
int			sm_probe_interval = SM_DEFAULT_PROBE_INTERVAL;
int			sm_max_attempts = SM_DEFAULT_ATTEMPTS;
int			sm_batch_max_events = SM_DEFAULT_BATCH_EVENTS;
int			sm_batch_max_bytes = SM_DEFAULT_BATCH_KB;
int			sm_compression = SM_COMPRESSION_GZIP;
int			sm_connect_timeout = SM_DEFAULT_CONNECT_MS;
int			sm_request_timeout = SM_DEFAULT_REQUEST_MS;
int			sm_retention = SM_DEFAULT_RETENTION_MIN;
int			sm_central_backup_window = SM_DEFAULT_BACKUP_WINDOW_MIN;
int			sm_reference_max_size = SM_DEFAULT_REFERENCE_KB;
char	   *sm_worker_role = NULL;
bool		sm_drop_undelivered = false;

static const struct config_enum_entry unknown_branch_options[] = {
	{"register", SM_UNKNOWN_REGISTER, false},
	{"refuse", SM_UNKNOWN_REFUSE, false},
	{NULL, 0, false}
};

static const struct config_enum_entry compression_options[] = {
	{"none", SM_COMPRESSION_NONE, false},
	{"gzip", SM_COMPRESSION_GZIP, false},
	{NULL, 0, false}
};

const char *
sm_guc_url_problem(const char *url)
{
	const char *authority;
	size_t		len;

	for (const unsigned char *p = (const unsigned char *) url; *p; p++)
		if (*p <= ' ' || *p >= 0x7f)
			return "A URL has no spaces, control or non-ASCII characters.";

	if (pg_strncasecmp(url, "http://", 7) == 0)
		authority = url + 7;
	else if (pg_strncasecmp(url, "https://", 8) == 0)
		authority = url + 8;
	else
		return "The URL must begin with https:// or http://.";

	len = strcspn(authority, "/?#");
	if (memchr(authority, '@', len) != NULL)
		return "Credentials do not belong in the URL; put a token into the file named by softmobile.auth_token_file.";
	if (len == 0 || authority[0] == ':')
		return "The URL names no host.";
	if (strpbrk(authority, "?#") != NULL)
		return "The URL must end with its path; a query or fragment has no meaning here.";
	return NULL;
}

const char *
sm_guc_branch_problem(const char *branch)
{
	size_t		len = strlen(branch);

	if (len == 0 || len > SM_BRANCH_MAX)
		return "A branch id has 1 to 100 bytes.";
	if (branch[0] == ' ' || branch[len - 1] == ' ')
		return "A branch id does not begin or end with a space.";
	for (const unsigned char *p = (const unsigned char *) branch; *p; p++)
		if (*p < ' ' || *p == 0x7f)
			return "A branch id has no control characters.";
	return NULL;
}

static bool
check_central_url(char **newval, void **extra, GucSource source)
{
	const char *problem;

	if ((*newval)[0] == '\0')
		return true;
	problem = sm_guc_url_problem(*newval);
	if (problem == NULL)
		return true;
	/* Not the value: it may hold a password, and the message goes to the log. */
	GUC_check_errmsg("invalid value for parameter \"%s\"", "softmobile.central_url");
	GUC_check_errdetail("%s", problem);
	GUC_check_errhint("Use the base URL of the central server, such as https://central.example/softmobile.");
	return false;
}

static bool
check_central_networks(char **newval, void **extra, GucSource source)
{
	SmNetworks *networks;
	const char *problem = sm_networks_parse(*newval, &networks);

	if (networks != NULL)
		pfree(networks);
	if (problem == NULL)
		return true;
	GUC_check_errdetail("%s", problem);
	GUC_check_errhint("List addresses and networks, such as '10.0.0.0/8, 192.0.2.7, 2001:db8::/32'.");
	return false;
}

static bool
check_branch_id(char **newval, void **extra, GucSource source)
{
	const char *problem;

	if ((*newval)[0] == '\0')
		return true;
	problem = sm_guc_branch_problem(*newval);
	if (problem == NULL)
		return true;
	GUC_check_errdetail("%s", problem);
	return false;
}

/*
 * A reason may still be too short here: that is for the trigger to say, and
 * only where a reason is required.  What can never be a reason is refused now.
 */
static bool
check_reason(char **newval, void **extra, GucSource source)
{
	const char *problem = sm_reason_problem(*newval);

	if (problem == NULL)
		return true;
	GUC_check_errdetail("%s", problem);
	GUC_check_errhint("State in one line why the change is made.");
	return false;
}

static void
define_central(void)
{
	DefineCustomStringVariable("softmobile.central_url",
							   "Base URL of the central server.",
							   "Empty: nothing is sent and events stay PENDING.",
							   &sm_central_url, "", PGC_SUSET, 0,
							   check_central_url, NULL, NULL);
	DefineCustomStringVariable("softmobile.auth_token_file",
							   "File holding the bearer token for the central server.",
							   "Must be readable by the server's user and by nobody else.",
							   &sm_auth_token_file, "", PGC_SUSET, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.signing_key_file",
							   "File of the keys that requests are signed with.",
							   "A key on each line, whsec_ and base64, the newest first. Must be readable by the server's user and by nobody else. Empty: no signatures.",
							   &sm_signing_key_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.ca_file",
							   "File of the certificate authorities that the central server is verified with.",
							   "Empty: those of the system.",
							   &sm_ca_file, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.client_cert_file",
							   "Client certificate shown to the central server.",
							   NULL, &sm_client_cert_file, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.client_key_file",
							   "Private key of the client certificate.",
							   NULL, &sm_client_key_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.central_networks",
							   "Networks in which the central server is.",
							   "Addresses and CIDR networks, with commas between them; nothing is sent elsewhere, whatever a name server says. Empty: any.",
							   &sm_central_networks, "", PGC_SIGHUP, 0,
							   check_central_networks, NULL, NULL);
}

static void
define_capture(void)
{
	DefineCustomStringVariable("softmobile.branch_id",
							   "Branch of rows that name none.",
							   "Empty: the name of the database.",
							   &sm_branch_id, "", PGC_SUSET, 0, check_branch_id, NULL, NULL);
	DefineCustomStringVariable("softmobile.reason",
							   "Reason (X-Reason) of the changes that follow.",
							   "Set it with SET LOCAL or set_reason(): a session-level SET survives into the next user of a pooled connection.",
							   &sm_reason, "", PGC_USERSET, 0, check_reason, NULL, NULL);
	DefineCustomEnumVariable("softmobile.unknown_branch",
							 "What becomes of a row whose branch is not registered.",
							 "register: it is captured and the worker registers the branch; refuse: the row is refused.",
							 &sm_unknown_branch, SM_UNKNOWN_REGISTER, unknown_branch_options,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("softmobile.enable_purchases_sales",
							 "Captures purchases and sales.",
							 "Off: changes of these entity types are not captured and never sent.",
							 &sm_enable_purchases_sales, true, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("softmobile.enable_transfers",
							 "Captures transfers between branches.",
							 "Off: changes of these entity types are not captured and never sent.",
							 &sm_enable_transfers, true, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("softmobile.enable_hybrid_prep",
							 "Captures everything that is neither purchase, sale nor transfer.",
							 "Off: changes of these entity types are not captured and never sent.",
							 &sm_enable_hybrid_prep, true, PGC_SUSET, 0, NULL, NULL, NULL);
}

static void
define_delivery(void)
{
	DefineCustomIntVariable("softmobile.sync_interval",
							"Longest time that one session of the worker lasts.",
							NULL, &sm_sync_interval, SM_DEFAULT_SYNC_INTERVAL,
							SM_MIN_SYNC_INTERVAL, SM_MAX_INTERVAL, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.retry_interval",
							"Time after which failed events are requeued automatically.",
							NULL, &sm_retry_interval, SM_DEFAULT_RETRY_INTERVAL,
							SM_MIN_RETRY_INTERVAL, SM_MAX_INTERVAL, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.probe_interval",
							"Longest time between two probes of a link that is down.",
							NULL, &sm_probe_interval, SM_DEFAULT_PROBE_INTERVAL,
							SM_MIN_PROBE_INTERVAL, SM_MAX_INTERVAL, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.max_attempts",
							"How often an event that central rejects is tried.",
							"A link that is down uses up none.",
							&sm_max_attempts, SM_DEFAULT_ATTEMPTS,
							SM_MIN_ATTEMPTS, SM_MAX_ATTEMPTS, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.batch_max_events",
							"Most events in one request.",
							NULL, &sm_batch_max_events, SM_DEFAULT_BATCH_EVENTS,
							SM_MIN_BATCH_EVENTS, SM_MAX_BATCH_EVENTS, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.batch_max_bytes",
							"Size at which a request takes no further event, before compression.",
							"One event that is larger travels alone.",
							&sm_batch_max_bytes, SM_DEFAULT_BATCH_KB,
							SM_MIN_BATCH_KB, SM_MAX_BATCH_KB, PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
	DefineCustomEnumVariable("softmobile.compression",
							 "Compression of requests.",
							 NULL, &sm_compression, SM_COMPRESSION_GZIP, compression_options,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.connect_timeout",
							"Time allowed for connecting to the central server.",
							NULL, &sm_connect_timeout, SM_DEFAULT_CONNECT_MS,
							SM_MIN_TIMEOUT_MS, SM_MAX_TIMEOUT_MS, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.request_timeout",
							"Time allowed for one request and its answer.",
							NULL, &sm_request_timeout, SM_DEFAULT_REQUEST_MS,
							SM_MIN_TIMEOUT_MS, SM_MAX_TIMEOUT_MS, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.retention",
							"How long delivered events are kept.",
							"Must exceed central's backup window: what central loses in a restore is sent again from here.",
							&sm_retention, SM_DEFAULT_RETENTION_MIN,
							SM_MIN_RETENTION_MIN, SM_MAX_RETENTION_MIN, PGC_SIGHUP, GUC_UNIT_MIN, NULL, NULL, NULL);
	DefineCustomStringVariable("softmobile.worker_role",
							   "Role that the worker runs as: LOGIN, not superuser.",
							   "Empty: the owner of the extension.",
							   &sm_worker_role, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("softmobile.drop_undelivered",
							 "Lets undelivered events be lost.",
							 "On: the extension can be dropped, and a branch deactivated, while events wait. For one session, never in a configuration file.",
							 &sm_drop_undelivered, false, PGC_SUSET, GUC_DISALLOW_IN_FILE, NULL, NULL, NULL);
}

static void
define_offline(void)
{
	DefineCustomIntVariable("softmobile.central_backup_window",
							"How far back a restore at headquarters can set central.",
							"softmobile.retention must exceed it, and by the length of a cut.",
							&sm_central_backup_window, SM_DEFAULT_BACKUP_WINDOW_MIN,
							SM_MIN_BACKUP_WINDOW_MIN, SM_MAX_RETENTION_MIN, PGC_SIGHUP, GUC_UNIT_MIN, NULL, NULL, NULL);
	DefineCustomIntVariable("softmobile.reference_max_size",
							"Largest document of reference data that prepare_offline() takes.",
							"A larger one is refused, and the version that is there stays.",
							&sm_reference_max_size, SM_DEFAULT_REFERENCE_KB,
							SM_MIN_REFERENCE_KB, SM_MAX_REFERENCE_KB, PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
}

void
sm_guc_report_flags(void)
{
	static bool reported[3] = {false};
	const struct
	{
		const char *name;
		const char *what;
		bool		enabled;
	}			flags[] = {
		{"softmobile.enable_purchases_sales", "purchases and sales", sm_enable_purchases_sales},
		{"softmobile.enable_transfers", "transfers", sm_enable_transfers},
		{"softmobile.enable_hybrid_prep", "what is neither purchase, sale nor transfer", sm_enable_hybrid_prep},
	};

	for (int i = 0; i < lengthof(flags); i++)
	{
		if (!flags[i].enabled && !reported[i])
			ereport(WARNING,
					(errmsg("softmobile: changes of %s are not captured", flags[i].what),
					 errdetail("The setting %s is off; such changes pass, and are never sent.", flags[i].name),
					 errhint("Set it on. softmobile.reconcile() finds what was changed meanwhile; a row is sent when it is changed again.")));
		reported[i] = !flags[i].enabled;
	}
}

void
sm_guc_init(void)
{
	define_central();
	define_capture();
	define_delivery();
	define_offline();
	MarkGUCPrefixReserved("softmobile");
}
